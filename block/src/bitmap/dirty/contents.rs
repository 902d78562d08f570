//! The contents of a bitmap: recording, asking, merging.

use std::ops::Range;

use super::Bitmap;
use crate::bitmap::Bits;
use crate::{Error, Result};

/// A part of the disk that is dirty or clean as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether it was written.
    pub dirty: bool,
}

impl Bitmap {
    /// The extents of a range in order, dirty and clean ones by turns, at most `max` of them. They
    /// begin at `offset` and end at the range's or the disk's end, or earlier if `max` is reached.
    ///
    /// Writes go on meanwhile; each extent is true at some moment of the call.
    pub fn extents(&self, offset: u64, len: u64, max: usize) -> Vec<Extent> {
        let state = self.state();
        let end = offset.saturating_add(len).min(state.size);
        let bits = self.granularity.bits();
        let mut extents = Vec::new();
        let mut at = offset;
        while at < end && extents.len() < max {
            let bit = at >> bits;
            let clear = state.bits.next_clear(bit);
            let dirty = clear > bit;
            let next = match dirty {
                true => Some(clear),
                false => state.bits.next_set(bit),
            };
            let stop = next.map_or(end, |bit| (bit << bits).min(end));
            extents.push(Extent { offset: at, len: stop - at, dirty });
            at = stop;
        }
        extents
    }
    /// Notes a write, if it is enabled.
    pub(crate) fn note(&self, offset: u64, len: u64) {
        let mut state = self.state();
        if state.enabled && !state.inconsistent {
            let bits = self.granularity.touched(offset, len);
            if let Some(since) = &mut state.since {
                since.set(bits.clone());
            }
            state.bits.set(bits);
            state.changed = true;
        }
    }

    /// Dirty ranges of bytes, in order.
    pub(crate) fn dirty_ranges(&self) -> Vec<Range<u64>> {
        let state = self.state();
        let shift = self.granularity.bits();
        let (mut at, mut list) = (0, Vec::new());
        while let Some(first) = state.bits.next_set(at) {
            at = state.bits.next_clear(first);
            list.push(first << shift..(at << shift).min(state.size));
        }
        list
    }

    /// Notes from now on what is written since, for [`Bitmap::end_since`]. Until then the bitmap has both:
    /// whatever happens, it never lacks anything. For who has the bitmap.
    pub(crate) fn begin_since(&self) {
        let mut state = self.state();
        state.since = Some(Bits::new(self.granularity.count(state.size)));
    }

    /// Ends [`Bitmap::begin_since`]: the bitmap has what was written since, and `left`; or, without `left`, all
    /// that it had. What the image has of it must be marked as out of date before.
    pub(crate) fn end_since(&self, left: Option<&[Range<u64>]>) {
        let mut state = self.state();
        let Some(mut since) = state.since.take() else { return };
        if let Some(left) = left {
            for range in left {
                since.set(self.granularity.touched(range.start, range.end - range.start));
            }
            state.bits = since;
            state.changed = true;
        }
    }

    pub(crate) fn clear(&self) {
        let mut state = self.state();
        state.changed = true;
        let len = self.granularity.count(state.size);
        state.bits = Bits::new(len);
    }

    /// Refuses a bitmap over a disk of another size.
    pub(crate) fn check_same_size(&self, other: &Self) -> Result<()> {
        let theirs = other.state().size;
        let ours = self.state().size;
        if ours != theirs {
            return Err(Error::Invalid(format!(
                "Bitmaps are of different sizes (destination size is {ours}, source size is {theirs}) and can't be merged"
            )));
        }
        Ok(())
    }

    /// Adds what is dirty in `other`, a bitmap over a disk of the same size.
    ///
    /// # Errors
    /// With QEMU's text if the sizes differ.
    pub(crate) fn merge(&self, other: &Self) -> Result<()> {
        self.check_same_size(other)?;
        // A copy, so that only one bitmap is locked at a time.
        let theirs = other.state().bits.clone();
        let mut state = self.state();
        state.changed = true;
        if self.granularity == other.granularity {
            state.bits.merge(&theirs);
            return Ok(());
        }
        let bits = other.granularity.bits();
        let mut at = 0;
        while let Some(first) = theirs.next_set(at) {
            at = theirs.next_clear(first);
            state.bits.set(self.granularity.touched(first << bits, (at - first) << bits));
        }
        Ok(())
    }

    /// Follows a change of the disk's size. What is new is dirty if the bitmap is enabled: a disk
    /// that is cut and extended again reads as zeroes where it had data. (QEMU leaves it clean.) So is
    /// the granule in which the old end lies: a part of it is new.
    pub(crate) fn resize(&self, size: u64) {
        let mut state = self.state();
        if state.size == size {
            return;
        }
        let old = state.size;
        let dirty = state.enabled && !state.inconsistent;
        state.bits.resize(self.granularity.count(size), dirty);
        if dirty && size > old {
            state.bits.set(self.granularity.touched(old, size - old));
        }
        state.size = size;
        state.changed = true;
    }

    /// Looks at the bits, or fills them at load.
    pub(crate) fn with_bits<T>(&self, f: impl FnOnce(&mut Bits) -> T) -> T {
        f(&mut self.state().bits)
    }
}
