//! Putting another image in a node's place, with no request under way.

use std::sync::{Arc, PoisonError};

use super::{Closed, Details, Holding, Live, Node};
use crate::format::Format;

impl Node {
    /// Holds requests back and waits until those in flight are over, for who changes nothing that
    /// another who does so must not change.
    pub(crate) fn hold_gate(&self) -> Holding {
        self.gate.hold()
    }

    /// Holds requests back and waits until those in flight are over, for the only one who changes the node.
    pub(crate) fn close_gate(&self) -> Closed {
        self.gate.close()
    }

    /// Puts another image in the place of the one there is. The gate must be closed.
    pub(crate) fn replace(&self, _closed: &Closed, format: Arc<dyn Format>, details: Details) {
        let live = Live { format, details: Arc::new(details) };
        let old = {
            let mut place = self.live.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *place, live)
        };
        // Outside the lock: the last handle of an image writes what it still has.
        drop(old);
    }

    /// Whether only this node has its image: no job works on its snapshots. With the gate closed. Waits for a
    /// flush of another image that makes up for what this one has not on disk yet.
    pub(crate) fn is_alone_with_format(&self) -> bool {
        let together = self.qcow2().and_then(|image| image.together());
        match together {
            Some(together) => together.between_tries(|| self.has_no_other_handle()),
            None => self.has_no_other_handle(),
        }
    }

    fn has_no_other_handle(&self) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let handles = 1 + usize::from(live.details.qcow2.is_some());
        Arc::strong_count(&live.format) == handles
    }
}
