//! Bytes that wait for a client to read them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::Arc;

/// A message that waits.
#[derive(Debug)]
struct Waiting {
    bytes: Arc<[u8]>,
    /// The client did not ask for it.
    event: bool,
}

/// A queue of messages, the first of them perhaps sent in part.
#[derive(Debug, Default)]
pub(super) struct OutputQueue {
    messages: VecDeque<Waiting>,
    /// Bytes of the first message that are sent.
    sent: usize,
    /// Bytes that are not.
    waiting: usize,
    /// Bytes of events in the queue; of one that is sent in part all.
    events: usize,
}

impl OutputQueue {
    /// Bytes that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Bytes of events among them.
    pub(super) fn events(&self) -> usize {
        self.events
    }

    /// Adds what the client has asked for.
    pub(super) fn push(&mut self, bytes: Arc<[u8]>) {
        self.waiting += bytes.len();
        self.messages.push_back(Waiting { bytes, event: false });
    }

    /// Adds an event.
    pub(super) fn push_event(&mut self, bytes: Arc<[u8]>) {
        self.waiting += bytes.len();
        self.events += bytes.len();
        self.messages.push_back(Waiting { bytes, event: true });
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Writes as much as is taken without blocking.
    pub(super) fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        while let Some(message) = self.messages.front() {
            let rest = message.bytes.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                if message.event {
                    self.events = self.events.saturating_sub(message.bytes.len());
                }
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
