//! One dirty bitmap.

mod contents;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::{Bits, Granularity};
use crate::{Error, Result};
pub use contents::Extent;

/// Most bits of a bitmap: what is kept for each part, clear or not, stays below 64 MiB.
const MAX_BITS: u64 = 1 << 36;

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

    pub(crate) fn set_enabled(&self, enabled: bool) {
        let mut state = self.state();
        state.changed = true;
        state.enabled = enabled;
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
