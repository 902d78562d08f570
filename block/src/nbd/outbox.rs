//! Replies on their way out: small parts gathered in one buffer, data sent from where it lies.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use crate::num::to_usize;
use crate::queue::OwnedBufs;

use super::pool::Pool;
use super::socket::{Moved, Socket};

/// Parts given to the kernel at once.
const MAX_PARTS: usize = 128;
/// Sent bytes of `small` that are kept while others wait behind them.
const COMPACT: usize = 64 << 10;

/// A part of the stream.
#[derive(Debug)]
enum Part {
    /// The next bytes of `small`.
    Small(usize),
    /// A buffer, from a byte on.
    Data(OwnedBufs, usize),
}

/// Replies that are gathered and not yet sent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    small: Vec<u8>,
    /// How much of `small` was sent.
    sent: usize,
    parts: VecDeque<Part>,
    /// Data bytes in `parts`.
    held: usize,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Bytes of memory that wait to be sent.
    pub(super) fn held(&self) -> usize {
        self.held + self.small.len()
    }

    /// Appends what `encode` writes.
    pub(super) fn small(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let before = self.small.len();
        encode(&mut self.small);
        let added = self.small.len() - before;
        match self.parts.back_mut() {
            Some(Part::Small(len)) => *len += added,
            _ if added == 0 => {}
            _ => self.parts.push_back(Part::Small(added)),
        }
    }

    /// Appends data, which must be one buffer of this program's.
    pub(super) fn data(&mut self, data: OwnedBufs) {
        if !data.is_empty() {
            self.held += to_usize(data.len());
            self.parts.push_back(Part::Data(data, 0));
        }
    }

    /// Sends until all is sent or there is no room; gives buffers back to the pool.
    pub(super) fn send(&mut self, socket: &Socket, pool: &mut Pool) -> io::Result<()> {
        while !self.parts.is_empty() {
            let (slices, total) = self.slices();
            match socket.send(&slices)? {
                Moved::Bytes(n) => {
                    self.advance(n, pool);
                    if n < total {
                        return Ok(());
                    }
                }
                Moved::Nothing | Moved::End => return Ok(()),
            }
        }
        Ok(())
    }

    fn slices(&self) -> (Vec<IoSlice<'_>>, usize) {
        let mut slices = Vec::with_capacity(self.parts.len().min(MAX_PARTS));
        let (mut at, mut total) = (self.sent, 0);
        for part in self.parts.iter().take(MAX_PARTS) {
            let bytes = match part {
                Part::Small(len) => {
                    at += len;
                    self.small.get(at - len..at).unwrap_or_default()
                }
                Part::Data(data, from) => {
                    data.as_slice().and_then(|data| data.get(*from..)).unwrap_or_default()
                }
            };
            total += bytes.len();
            slices.push(IoSlice::new(bytes));
        }
        (slices, total)
    }

    fn advance(&mut self, mut n: usize, pool: &mut Pool) {
        while let Some(part) = self.parts.front_mut() {
            let left = match part {
                Part::Small(len) => *len,
                Part::Data(data, from) => to_usize(data.len()) - *from,
            };
            let now = left.min(n);
            n -= now;
            match part {
                Part::Small(len) => {
                    self.sent += now;
                    *len -= now;
                }
                Part::Data(_, from) => {
                    self.held -= now;
                    *from += now;
                }
            }
            if now < left {
                break;
            }
            if let Some(Part::Data(data, _)) = self.parts.pop_front() {
                pool.give_bufs(data);
            }
        }
        if self.parts.is_empty() {
            self.small.clear();
            self.sent = 0;
        } else if self.sent > COMPACT {
            self.small.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(outbox: &Outbox) -> Vec<u8> {
        outbox.slices().0.iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn bytes_leave_in_order_whatever_the_kernel_takes_at_once() {
        for step in [1, 2, 3, 5, 7, 100] {
            let (mut outbox, mut pool) = (Outbox::default(), Pool::default());
            let mut expected = Vec::new();
            for n in 0..20u8 {
                outbox.small(|out| out.extend_from_slice(&[n; 3]));
                outbox.small(|out| out.extend_from_slice(&[n; 2]));
                outbox.data(OwnedBufs::from_vec(vec![n + 100; usize::from(n)]));
                expected.extend_from_slice(&[n; 5]);
                expected.extend(vec![n + 100; usize::from(n)]);
            }
            let mut sent = Vec::new();
            while !outbox.is_empty() {
                let all = contents(&outbox);
                let n = all.len().min(step);
                sent.extend_from_slice(&all[..n]);
                outbox.advance(n, &mut pool);
            }
            assert_eq!(sent, expected, "in steps of {step}");
            assert_eq!(outbox.held(), 0);
        }
    }

    #[test]
    fn a_backlog_that_never_ends_does_not_keep_what_was_sent() {
        let (mut outbox, mut pool) = (Outbox::default(), Pool::default());
        outbox.small(|out| out.push(0));
        for _ in 0..1000 {
            outbox.small(|out| out.extend_from_slice(&[1; 1000]));
            outbox.advance(1000, &mut pool);
        }
        assert!(outbox.held() <= COMPACT + 2001, "{}", outbox.held());
    }
}
