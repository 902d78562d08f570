//! Requests: their way past interceptors, to the image, to those who watch.

use super::intercept::{Change, ChangeKind};
use super::{Access, Node};
use crate::graph::DetectZeroes;
use crate::{Preallocation, Progress, ReadBuf, Result, WriteBuf, iobuf};

impl Node {
    /// The right to carry out a request; waits while the image is being replaced. A thread that
    /// has to complete other requests of its own meanwhile calls [`Node::try_access`] instead.
    pub fn access(&self) -> Access {
        let passage = self.gate.enter();
        Access::new(self.format(), passage)
    }

    /// As [`Node::access`]; `None` while the image is being replaced.
    pub fn try_access(&self) -> Option<Access> {
        let passage = self.gate.try_enter()?;
        Some(Access::new(self.format(), passage))
    }

    /// Reads `bufs` one after another from `offset`.
    ///
    /// # Errors
    /// As [`Format::read`].
    pub fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.access().read(offset, bufs)
    }

    /// Writes `bufs` one after another at `offset`. Durable only after [`Node::flush`].
    ///
    /// # Errors
    /// As [`Format::write`].
    pub fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.change(&Change::write(offset, bufs))
    }

    /// As [`Node::write`], compressed.
    ///
    /// # Errors
    /// As [`Format::write_compressed`].
    pub fn write_compressed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.change(&Change::compressed(offset, bufs))
    }

    fn change(&self, change: &Change<'_>) -> Result<()> {
        {
            let access = self.access();
            if !self.intercepts(change) {
                return self.make(&access, change);
            }
        }
        let made = |change: &Change<'_>| (self.make(&self.access(), change), ());
        self.interception.around(change, made).0
    }

    /// Whether a change has to go through interceptors; with an [`Access`]. Not one that the image
    /// refuses.
    pub(super) fn intercepts(&self, change: &Change<'_>) -> bool {
        self.intercepted()
            && change.len > 0
            && self.look(|format| !format.read_only() && change.end() <= format.size())
    }

    /// Makes a change, after the interceptors.
    pub(super) fn make(&self, access: &Access, change: &Change<'_>) -> Result<()> {
        let Change { offset, len, kind } = *change;
        let image = access.format();
        let result = match kind {
            ChangeKind::Write(bufs) => match self.zeroes_to_detect(bufs) {
                Some(unmap) => image.write_zeroes(offset, len, unmap),
                None => image.write(offset, bufs),
            },
            ChangeKind::Compressed(bufs) => image.write_compressed(offset, bufs),
            ChangeKind::Zeroes { unmap } => image.write_zeroes(offset, len, unmap),
            ChangeKind::Discard => image.discard(offset, len),
        };
        match kind {
            ChangeKind::Discard => self.note_change(offset, len),
            _ => self.note_write(offset, len),
        }
        result
    }

    /// Whether a write is to become one of zeroes (QEMU's `detect-zeroes`), and whether that may
    /// give space back. For those who carry out writes by an [`Access`] of their own.
    pub(crate) fn zeroes_to_detect(&self, bufs: &[WriteBuf<'_>]) -> Option<bool> {
        let unmap = match self.detect_zeroes() {
            DetectZeroes::Off => return None,
            DetectZeroes::On => false,
            DetectZeroes::Unmap => true,
        };
        iobuf::is_zero(bufs).then_some(unmap)
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// As [`Format::flush`].
    pub fn flush(&self) -> Result<()> {
        self.access().flush()
    }

    /// Gives the disk another size, with no request under way; its dirty bitmaps follow.
    ///
    /// # Errors
    /// As [`Format::resize`]; or somebody has a bitmap.
    pub fn resize(&self, size: u64, mode: Preallocation, progress: &Progress) -> Result<()> {
        let closed = self.close_gate();
        if self.intercepted() {
            // A change that no interceptor would see. The graph's permissions keep it from coming here.
            return self.check_no_job();
        }
        let (format, bitmaps) = (self.format(), self.bitmaps());
        if size != format.size() {
            bitmaps.check_resize(size)?;
        }
        let result = format.resize(size, mode, progress);
        // Also after an error: a format may have got halfway. Those with bitmaps of their own have
        // done it, in their order.
        bitmaps.resize(format.size());
        drop(closed);
        result
    }

    /// Tells that the range is not needed. It reads as zeroes afterwards or as before.
    ///
    /// # Errors
    /// As [`Format::discard`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.change(&Change::discard(offset, len))
    }

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As [`Format::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(&Change::zeroes(offset, len, unmap))
    }
}
