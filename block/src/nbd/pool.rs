//! A pool of data buffers: fresh pages would cost more than the transfer.

use crate::queue::{AlignedBuf, BUF_ALIGN, OwnedBufs};

/// Bytes kept while nobody uses them.
const KEEP: usize = 16 << 20;
/// Sizes are `BUF_ALIGN << class`; the last is the largest payload.
const CLASSES: usize = 14;

/// Aligned buffers in sizes of powers of two.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: [Vec<AlignedBuf>; CLASSES],
    kept: usize,
}

fn class_of(len: usize) -> usize {
    let blocks = len.div_ceil(BUF_ALIGN).max(1);
    blocks.next_power_of_two().trailing_zeros() as usize
}

impl Pool {
    /// A buffer of at least `len` bytes; its contents are those of an earlier use in this
    /// connection, or zeroes.
    pub(super) fn take(&mut self, len: usize) -> AlignedBuf {
        let class = class_of(len);
        match self.free.get_mut(class).and_then(Vec::pop) {
            Some(buf) => {
                self.kept -= buf.len();
                buf
            }
            None => AlignedBuf::new(BUF_ALIGN << class),
        }
    }

    /// Takes a buffer back.
    pub(super) fn give(&mut self, buf: AlignedBuf) {
        let class = class_of(buf.len());
        if self.kept + buf.len() <= KEEP
            && let Some(free) = self.free.get_mut(class)
        {
            self.kept += buf.len();
            free.push(buf);
        }
    }

    /// Takes the memory of a request back.
    pub(super) fn give_bufs(&mut self, bufs: OwnedBufs) {
        if let Some(buf) = bufs.into_aligned() {
            self.give(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::MAX_PAYLOAD;
    use super::*;

    #[test]
    fn buffers_come_back_for_requests_of_their_size() {
        let mut pool = Pool::default();
        for len in [1, 4096, 4097, 1 << 20, MAX_PAYLOAD as usize] {
            let buf = pool.take(len);
            assert!(buf.len() >= len && buf.len() < 2 * len.max(BUF_ALIGN));
            let at = buf.as_ptr();
            let kept = buf.len() <= KEEP;
            pool.give(buf);
            assert_eq!(pool.take(len).as_ptr() == at && pool.kept == 0, kept || pool.kept == 0);
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut pool = Pool::default();
        let bufs: Vec<_> = (0..64).map(|_| pool.take(1 << 20)).collect();
        bufs.into_iter().for_each(|buf| pool.give(buf));
        assert_eq!(pool.kept, KEEP);
    }
}
