//! Reads: in one part, or in several where there are holes.

use crate::num::to_usize;
use crate::queue::{Op, OwnedBufs};
use crate::status::StatusExtent;

use crate::nbd::wire::reply::To;
use crate::nbd::wire::{Errno, Mode};

use super::Transmission;
use super::pending::{Group, Work};

/// Reads of at least this size are looked at for holes.
const SPARSE_READ: u32 = 32 << 10;
/// Chunks of a read; what is left is one more.
const MAX_CHUNKS: usize = 16;

impl Transmission {
    /// A chunk must have at least one byte.
    pub(super) fn empty_read(&mut self, to: To, offset: u64) {
        self.outbox.small(|out| match to.mode {
            Mode::Simple => to.data(out, true, offset, 0),
            Mode::Structured | Mode::Extended => to.end(out),
        });
    }

    pub(super) fn begin_read(&mut self, to: To, offset: u64, len: u32, whole: bool) {
        if whole || len < SPARSE_READ || to.mode == Mode::Simple {
            return self.read_part(to, offset, u64::from(len), None);
        }
        // An error shows again, at the right place, when the data is read.
        let entered = self.export.link().try_enter();
        let status = entered.map(|e| e.access().block_status(offset, u64::from(len)));
        let status = status.and_then(Result::ok).unwrap_or_default();
        let parts = chunks(offset, u64::from(len), &status);
        if let [part] = parts[..]
            && !part.hole
        {
            return self.read_part(to, offset, u64::from(len), None);
        }
        let reads = parts.iter().filter(|part| !part.hole).count();
        for part in parts.iter().filter(|part| part.hole) {
            let done = reads == 0 && parts.len() == 1;
            let len = u32::try_from(part.len).unwrap_or(u32::MAX);
            self.outbox.small(|out| to.hole(out, done, part.offset, len));
        }
        if reads > 0 {
            let group = self.groups.insert(Group { left: reads, error: None });
            for part in parts.iter().filter(|part| !part.hole) {
                self.read_part(to, part.offset, part.len, Some(group));
            }
        }
    }

    fn read_part(&mut self, to: To, offset: u64, len: u64, group: Option<usize>) {
        let len = to_usize(len);
        let bufs = OwnedBufs::aligned_part(self.pool.take(len), len);
        self.submit(to, Work::Read { offset, group }, Op::Read { offset }, bufs);
    }

    pub(super) fn finish_read(
        &mut self,
        to: To,
        offset: u64,
        group: Option<usize>,
        error: Option<Errno>,
        bufs: OwnedBufs,
    ) {
        // Of a request in parts, the last part ends the reply, with the first error if there was one.
        let (last, first_error) =
            match group.and_then(|group| Some((group, self.groups.get_mut(group)?))) {
                Some((at, group)) => {
                    group.left -= 1;
                    group.error = group.error.or(error);
                    let (last, first_error) = (group.left == 0, group.error);
                    if last {
                        self.groups.try_remove(at);
                    }
                    (last, first_error)
                }
                None => (true, error),
            };
        if error.is_none() {
            let done = last && first_error.is_none();
            let len = to_usize(bufs.len());
            self.outbox.small(|out| to.data(out, done, offset, len));
            self.outbox.data(bufs);
        } else {
            self.pool.give_bufs(bufs);
        }
        if last && let Some(error) = first_error {
            self.outbox.small(|out| to.error(out, error, "read failed"));
        }
    }
}

/// A part of a read's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    offset: u64,
    len: u64,
    hole: bool,
}

/// Cuts a range into data and holes by the status of a prefix of it.
fn chunks(offset: u64, len: u64, status: &[StatusExtent]) -> Vec<Chunk> {
    let mut list: Vec<Chunk> = Vec::new();
    let (mut at, end) = (offset, offset + len);
    for extent in status {
        let n = extent.len.min(end - at);
        let full = list.len() >= MAX_CHUNKS;
        match list.last_mut() {
            Some(last) if last.hole == extent.zero => last.len += n,
            _ if full => break,
            _ => list.push(Chunk { offset: at, len: n, hole: extent.zero }),
        }
        at += n;
    }
    match list.last_mut() {
        Some(last) if !last.hole => last.len += end - at,
        _ if at < end => list.push(Chunk { offset: at, len: end - at, hole: false }),
        _ => {}
    }
    list
}

#[cfg(test)]
mod tests;
