//! Whether all of guest memory is there.
//!
//! After a lazy load, pages of guest memory come when they are touched. Touching one in a device's
//! own code just takes longer. Letting the host's kernel touch it in the middle of a file operation
//! must not be: the file system may hold a lock on the very file that the page is to be read from.
//! So whoever hands guest memory to the kernel for file I/O calls [`Presence::wait_for`] first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;

const WHOLE: u8 = 0;
const MISSING: u8 = 1;
const LOST: u8 = 2;

const PAGE: usize = 4096;

/// Tells all devices of a machine; clones tell the same.
#[derive(Debug, Clone, Default)]
pub struct Presence(Arc<AtomicU8>);

/// Guest memory is not what it should be, or not guest memory at all: a request that would carry it
/// to a disk must fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unusable;

impl Presence {
    /// All of guest memory is there.
    pub fn set_whole(&self) {
        self.0.store(WHOLE, Ordering::Release);
    }

    /// Pages may be missing from now on. The devices are paused.
    pub fn set_missing(&self) {
        self.0.store(MISSING, Ordering::Release);
    }

    /// Pages that could not be had are about to become zero.
    pub fn set_lost(&self) {
        self.0.store(LOST, Ordering::Release);
    }

    /// Waits until the bytes are there.
    ///
    /// # Errors
    /// They may be zeroes that stand for what is lost.
    pub fn wait_for(
        &self,
        mem: &GuestMemory,
        start: GuestAddress,
        len: usize,
    ) -> Result<(), Unusable> {
        if self.0.load(Ordering::Acquire) == WHOLE || len == 0 {
            return Ok(());
        }
        for offset in (0..len).step_by(PAGE).chain([len - 1]) {
            let address = start.0.checked_add(offset as u64).ok_or(Unusable)?;
            mem.read_obj::<u8>(GuestAddress(address)).map_err(|_| Unusable)?;
        }
        // What was touched may have been given up only just now.
        match self.0.load(Ordering::Acquire) {
            LOST => Err(Unusable),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_usable_unless_it_is_lost() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 2 * PAGE)]).unwrap();
        let presence = Presence::default();
        let clone = presence.clone();
        let all = |len| clone.wait_for(&mem, GuestAddress(0), len);
        assert_eq!(all(2 * PAGE), Ok(()));
        presence.set_missing();
        assert_eq!(all(2 * PAGE), Ok(()));
        assert_eq!(all(2 * PAGE + 1), Err(Unusable));
        presence.set_lost();
        assert_eq!(all(1), Err(Unusable));
        assert_eq!(all(0), Ok(()));
        presence.set_whole();
        assert_eq!(all(1), Ok(()));
    }
}
