//! Bytes that wait for a client to read them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::Arc;

/// A queue of messages, the first of them perhaps sent in part.
#[derive(Debug, Default)]
pub(super) struct OutputQueue {
    messages: VecDeque<Arc<[u8]>>,
    /// Bytes of the first message that are sent.
    sent: usize,
    /// Bytes that are not.
    waiting: usize,
}

impl OutputQueue {
    /// Bytes that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(super) fn push(&mut self, message: Arc<[u8]>) {
        self.waiting += message.len();
        self.messages.push_back(message);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Writes as much as is taken without blocking.
    pub(super) fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        while let Some(message) = self.messages.front() {
            let rest = message.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                self.messages.pop_front();
                self.sent = 0;
                continue;
            }
            match to.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.sent += count;
                    self.waiting = self.waiting.saturating_sub(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
