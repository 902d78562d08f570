//! One dirty bitmap.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::{Error, Result};

use super::Bits;

/// Most bits of a bitmap: what is kept for each part, clear or not, stays below 64 MiB.
const MAX_BITS: u64 = 1 << 36;

/// Bytes that one bit stands for: a power of two, 512 B to 2 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granularity(u32);

impl Granularity {
    /// As QMP and the command line give it.
    ///
    /// # Errors
    /// With QEMU's text if it is not a power of two from 512 to 2 GiB.
    pub fn new(bytes: u64) -> Result<Self> {
        if bytes < 512 || !bytes.is_power_of_two() {
            return Err(Error::Invalid(
                "Granularity must be power of 2 and at least 512".to_owned(),
            ));
        }
        Self::from_bits(bytes.trailing_zeros()).ok_or_else(|| {
            Error::Invalid(format!("Granularity of {bytes} bytes is above the maximum of 2 GiB"))
        })
    }

    /// 2 to the power of `bits` (`granularity_bits` of a stored bitmap).
    pub(crate) fn from_bits(bits: u32) -> Option<Self> {
        (9..=31).contains(&bits).then_some(Self(bits))
    }

    /// What a bitmap has when none is asked for, as in QEMU: the cluster size, within 4 KiB to 64 KiB.
    pub fn default_for(cluster_size: Option<u64>) -> Self {
        Self(cluster_size.unwrap_or(65536).clamp(4096, 65536).trailing_zeros())
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// log2 of the bytes.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// Bits for a disk of `size` bytes.
    pub(crate) fn count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// The bits that a range of bytes touches.
    fn touched(self, offset: u64, len: u64) -> Range<u64> {
        match len {
            0 => 0..0,
            _ => offset >> self.0..(offset.saturating_add(len - 1) >> self.0) + 1,
        }
    }
}

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

/// `BlockDirtyInfo` of QMP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BitmapInfo {
    /// The bitmap's name.
    pub name: String,
    /// Dirty bytes, in whole granules.
    pub count: u64,
    /// Bytes of a granule.
    pub granularity: u64,
    /// Whether writes are noted.
    pub recording: bool,
    /// Whether an export or another operation has it.
    pub busy: bool,
    /// Whether it is stored in the image when that is closed.
    pub persistent: bool,
    /// Whether it was not stored properly: it can only be removed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub inconsistent: bool,
}

/// What the image has of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Nothing.
    No,
    /// An entry that says it is out of date (in_use), or one that nobody may use.
    OutOfDate,
    /// What memory has.
    UpToDate,
}

#[derive(Debug)]
struct State {
    bits: Bits,
    /// What was written since an operation that has the bitmap began: also in `bits`.
    since: Option<Bits>,
    /// Bytes of the disk.
    size: u64,
    enabled: bool,
    persistent: bool,
    inconsistent: bool,
    /// It is part of an image that is open read-only.
    read_only: bool,
    busy: bool,
    /// Whether anything differs from what the image has, apart from its being marked.
    changed: bool,
    stored: Stored,
}

/// A dirty bitmap. All methods may be called from several threads.
#[derive(Debug)]
pub struct Bitmap {
    name: String,
    granularity: Granularity,
    state: Mutex<State>,
}

/// Keeps a bitmap from being changed or removed by commands until it is dropped: `busy` in QMP.
/// Writes are noted all the same.
#[derive(Debug)]
pub struct BitmapHold(Arc<Bitmap>);

impl BitmapHold {
    /// The bitmap.
    pub fn bitmap(&self) -> &Arc<Bitmap> {
        &self.0
    }
}

impl Drop for BitmapHold {
    fn drop(&mut self) {
        self.0.state().busy = false;
    }
}

/// How a new bitmap starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) enabled: bool,
    pub(crate) persistent: bool,
    pub(crate) inconsistent: bool,
    pub(crate) read_only: bool,
    pub(crate) stored: Stored,
}

impl Bitmap {
    /// A clear bitmap over a disk of `size` bytes.
    ///
    /// # Errors
    /// If it would have too many bits.
    pub(crate) fn new(
        name: &str,
        granularity: Granularity,
        size: u64,
        start: Start,
    ) -> Result<Self> {
        check_bits(name, granularity, size)?;
        Ok(Self {
            name: name.to_owned(),
            granularity,
            state: Mutex::new(State {
                bits: Bits::new(granularity.count(size)),
                since: None,
                size,
                enabled: start.enabled,
                persistent: start.persistent,
                inconsistent: start.inconsistent,
                read_only: start.read_only,
                busy: false,
                changed: false,
                stored: start.stored,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name, unique on its node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Whether writes are noted.
    pub fn enabled(&self) -> bool {
        self.state().enabled
    }

    /// Whether it is stored in the image when that is closed.
    pub fn persistent(&self) -> bool {
        self.state().persistent
    }

    /// Whether it was not stored properly: it can only be removed.
    pub fn inconsistent(&self) -> bool {
        self.state().inconsistent
    }

    /// What QMP tells of it.
    pub fn info(&self) -> BitmapInfo {
        let state = self.state();
        BitmapInfo {
            name: self.name.clone(),
            count: state.bits.count() << self.granularity.bits(),
            granularity: self.granularity.bytes(),
            recording: state.enabled && !state.inconsistent,
            busy: state.busy,
            persistent: state.persistent,
            inconsistent: state.inconsistent,
        }
    }

    /// Dirty bytes, in whole granules.
    pub fn dirty_bytes(&self) -> u64 {
        self.state().bits.count() << self.granularity.bits()
    }

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

    /// Takes the bitmap for an export or an operation.
    ///
    /// # Errors
    /// With QEMU's text if somebody has it, or it is inconsistent.
    pub fn hold(self: &Arc<Self>) -> Result<BitmapHold> {
        let mut state = self.state();
        state.check_usable(&self.name)?;
        state.busy = true;
        drop(state);
        Ok(BitmapHold(self.clone()))
    }

    /// Refuses what somebody has or nobody may use.
    pub(crate) fn check_usable(&self) -> Result<()> {
        self.state().check_usable(&self.name)
    }

    /// As [`Bitmap::check_usable`], for changes of the contents.
    pub(crate) fn check_changeable(&self) -> Result<()> {
        let state = self.state();
        state.check_usable(&self.name)?;
        state.check_writable(&self.name)
    }

    /// Refuses what somebody has or the image does not let go: an inconsistent one can be removed.
    pub(crate) fn check_removable(&self) -> Result<()> {
        let state = self.state();
        state.check_idle(&self.name)?;
        state.check_writable(&self.name)
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

    pub(crate) fn set_enabled(&self, enabled: bool) {
        let mut state = self.state();
        state.changed = true;
        state.enabled = enabled;
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
    /// that is cut and extended again reads as zeroes where it had data. (QEMU leaves it clean.)
    pub(crate) fn resize(&self, size: u64) {
        let mut state = self.state();
        if state.size == size {
            return;
        }
        let dirty = state.enabled && !state.inconsistent;
        state.bits.resize(self.granularity.count(size), dirty);
        state.size = size;
        state.changed = true;
    }

    /// Whether a disk of `size` bytes is too large.
    pub(crate) fn check_size(&self, size: u64) -> Result<()> {
        check_bits(&self.name, self.granularity, size)
    }

    /// Whether it differs from what the image has of it, apart from the mark.
    pub(crate) fn changed(&self) -> bool {
        self.state().changed
    }

    pub(crate) fn set_unchanged(&self) {
        self.state().changed = false;
    }

    /// Takes over what the image says of the bitmap, which was stored and read again as `loaded`.
    pub(crate) fn follow(&self, loaded: &Self) {
        let (read_only, inconsistent, stored) = {
            let state = loaded.state();
            (state.read_only, state.inconsistent, state.stored)
        };
        let mut state = self.state();
        (state.read_only, state.inconsistent, state.stored) = (read_only, inconsistent, stored);
    }

    pub(crate) fn stored(&self) -> Stored {
        self.state().stored
    }

    pub(crate) fn set_stored(&self, stored: Stored) {
        self.state().stored = stored;
    }

    /// Looks at the bits, or fills them at load.
    pub(crate) fn with_bits<T>(&self, f: impl FnOnce(&mut Bits) -> T) -> T {
        f(&mut self.state().bits)
    }
}

impl State {
    fn check_idle(&self, name: &str) -> Result<()> {
        if self.busy {
            return Err(Error::Invalid(format!(
                "Bitmap '{name}' is currently in use by another operation and cannot be used"
            )));
        }
        Ok(())
    }

    fn check_writable(&self, name: &str) -> Result<()> {
        if self.read_only {
            return Err(Error::Invalid(format!(
                "Bitmap '{name}' is readonly and cannot be modified"
            )));
        }
        Ok(())
    }

    fn check_usable(&self, name: &str) -> Result<()> {
        self.check_idle(name)?;
        if self.inconsistent {
            return Err(Error::Invalid(format!(
                "Bitmap '{name}' is inconsistent and cannot be used"
            )));
        }
        Ok(())
    }
}

fn check_bits(name: &str, granularity: Granularity, size: u64) -> Result<()> {
    if granularity.count(size) > MAX_BITS {
        return Err(Error::Invalid(format!(
            "Bitmap '{name}' would have too many bits for a disk of {size} bytes: choose a larger granularity than {}",
            granularity.bytes()
        )));
    }
    Ok(())
}
