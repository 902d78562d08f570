//! A located request, from its start to its completion.

use std::sync::Arc;

use super::super::located::Located;
use super::super::{Completion, Op, Request};
use crate::Result;
use crate::format::Format;
use crate::node::Entered;

/// A located request.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) request: Request,
    pub(super) located: Located,
    pub(super) access: Arc<Entered>,
    /// Transfers that have not ended, and one for the start of others.
    pub(super) left: usize,
    pub(super) result: Result<()>,
}

impl Active {
    /// Puts new places into the tables or gives them back; false if that must be done again, waiting.
    pub(super) fn finish_write(&mut self, wait: bool) -> bool {
        if self.located.targets.is_empty() {
            return true;
        }
        let written = self.result.is_ok();
        match self.access.access().format().finish_write(&mut self.located, written, wait) {
            Some(result) => {
                self.located.targets.clear();
                if written {
                    self.result = result;
                }
                true
            }
            None => false,
        }
    }

    pub(super) fn complete(self, result: Result<()>) -> Completion {
        Completion { id: self.request.id, result, bufs: self.request.bufs }
    }

    /// Tells those who watch the node.
    pub(super) fn note(&self) {
        if let Op::Write { offset, .. } = self.request.op {
            self.access.node().note_write(offset, self.request.bufs.len());
        }
    }
}

/// Where a request is, if that can be told at once.
pub(super) fn locate(image: &dyn Format, request: &Request, located: &mut Located) -> bool {
    let len = request.bufs.len();
    if len == 0 {
        return false;
    }
    match request.op {
        Op::Read { offset } => image.locate_read(offset, len, located),
        Op::Write { offset, .. } => image.locate_write(offset, len, located),
        _ => false,
    }
}
