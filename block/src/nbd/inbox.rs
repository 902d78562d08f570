//! Bytes that were received from a client and are not parsed yet.

use std::io::{self, IoSliceMut};

use super::socket::{Moved, Socket};

/// One call takes as many small requests as there are.
const CAPACITY: usize = 256 << 10;

/// A window of received bytes in a fixed buffer.
#[derive(Debug)]
pub(super) struct Inbox {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { buf: vec![0; CAPACITY].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What is there.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Drops bytes from the front.
    pub(super) fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves bytes from the front to `to`; gives their number.
    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let n = to.len().min(self.end - self.start);
        to[..n].copy_from_slice(&self.buf[self.start..self.start + n]);
        self.consume(n);
        n
    }

    /// Receives: first into `first`, whose bytes must follow those that are here (so here there must
    /// be none), then up to `most` bytes into the inbox. Gives how many went to `first`.
    pub(super) fn fill(
        &mut self,
        socket: &Socket,
        first: &mut [u8],
        most: usize,
        wait: bool,
    ) -> io::Result<(Moved, usize)> {
        debug_assert!(first.is_empty() || self.start == self.end);
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let to = self.buf.len().min(self.end.saturating_add(most));
        let first_len = first.len();
        let rest = &mut self.buf[self.end..to];
        let moved = if first_len == 0 {
            socket.recv(&mut [IoSliceMut::new(rest)], wait)?
        } else {
            socket.recv(&mut [IoSliceMut::new(first), IoSliceMut::new(rest)], wait)?
        };
        let Moved::Bytes(n) = moved else {
            return Ok((moved, 0));
        };
        let direct = n.min(first_len);
        self.end += n - direct;
        Ok((moved, direct))
    }
}
