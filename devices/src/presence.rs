//! Whether all of guest memory is there, and may be written.
//!
//! After a lazy load, pages of guest memory come when they are touched; while a live save guards memory, who
//! writes a page may have to wait until other pages have been written to the image. Touching one in a device's
//! own code just takes longer. Letting the host's kernel touch it in the middle of a file operation
//! must not be: the file system may hold a lock on the very file that the page is to be read from, or that
//! is to be written first. So whoever hands guest memory to the kernel for file I/O calls
//! [`Presence::wait_for`] first, or [`Presence::wait_to_fill`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::GuestMemory;

const WHOLE: u8 = 0;
const MISSING: u8 = 1;
const LOST: u8 = 2;

const PAGE: usize = 4096;

/// Tells all devices of a machine; clones tell the same.
#[derive(Debug, Clone, Default)]
pub struct Presence(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: AtomicU8,
    guarded: AtomicBool,
}

/// Guest memory is not what it should be, or not guest memory at all: a request that would carry it
/// to a disk must fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unusable;

impl Presence {
    /// All of guest memory is there.
    pub fn set_whole(&self) {
        self.0.state.store(WHOLE, Ordering::Release);
    }

    /// Pages may be missing from now on. The devices are paused.
    pub fn set_missing(&self) {
        self.0.state.store(MISSING, Ordering::Release);
    }

    /// Pages that could not be had are about to become zero.
    pub fn set_lost(&self) {
        self.0.state.store(LOST, Ordering::Release);
    }

    /// Pages may be guarded against writes from now on, or are no more. What the kernel fills already must be
    /// filled before a write to a guarded page can have to wait for long.
    pub fn set_guarded(&self, guarded: bool) {
        self.0.guarded.store(guarded, Ordering::Release);
    }

    /// As [`Presence::wait_for`], and until the bytes may be written. Their contents stay.
    ///
    /// # Errors
    /// As [`Presence::wait_for`].
    pub fn wait_to_fill(
        &self,
        mem: &GuestMemory,
        start: GuestAddress,
        len: usize,
    ) -> Result<(), Unusable> {
        self.wait_for(mem, start, len)?;
        if !self.0.guarded.load(Ordering::Acquire) || len == 0 {
            return Ok(());
        }
        for address in touched(start, len) {
            write_touch(mem, address?)?;
        }
        Ok(())
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
        if self.0.state.load(Ordering::Acquire) == WHOLE || len == 0 {
            return Ok(());
        }
        for address in touched(start, len) {
            mem.read_obj::<u8>(address?).map_err(|_| Unusable)?;
        }
        // What was touched may have been given up only just now.
        match self.0.state.load(Ordering::Acquire) {
            LOST => Err(Unusable),
            _ => Ok(()),
        }
    }
}

/// A byte in each page of a range that is not empty.
fn touched(
    start: GuestAddress,
    len: usize,
) -> impl Iterator<Item = Result<GuestAddress, Unusable>> {
    let address = move |offset| start.0.checked_add(offset as u64).map(GuestAddress);
    (0..len).step_by(PAGE).chain([len - 1]).map(move |offset| address(offset).ok_or(Unusable))
}

/// Writes to a page, and changes nothing.
fn write_touch(mem: &GuestMemory, address: GuestAddress) -> Result<(), Unusable> {
    let byte = GuestMemoryBackend::get_slice(mem, address, 1).map_err(|_| Unusable)?;
    let byte = byte.get_atomic_ref::<AtomicU8>(0).map_err(|_| Unusable)?;
    let now = byte.load(Ordering::Relaxed);
    // To the processor it is a write, also where the guest has changed the byte in between; one that adds
    // nothing the compiler would make a read.
    let _ = byte.compare_exchange(now, now, Ordering::Relaxed, Ordering::Relaxed);
    Ok(())
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

    /// How many pages have memory of their own; one that was only read is the host's page of zeroes.
    fn written_pages(mem: &GuestMemory) -> usize {
        use vm_memory::GuestMemoryRegion;
        let region = mem.iter().next().unwrap();
        let (start, len) = (region.as_ptr().addr(), usize::try_from(region.len()).unwrap());
        let mut entries = vec![0; len / PAGE * 8];
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let at = u64::try_from(start / PAGE * 8).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, at).unwrap();
        // Bit 56: exclusively mapped.
        let own = |entry: &&[u8; 8]| u64::from_ne_bytes(**entry) & 1 << 56 != 0;
        entries.as_chunks::<8>().0.iter().filter(own).count()
    }

    #[test]
    fn memory_that_the_host_is_to_fill_is_written_before_where_it_is_guarded() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 16 * PAGE)]).unwrap();
        mem.write_obj(0x5a_u8, GuestAddress(0x3008)).unwrap();
        let presence = Presence::default();
        let fill = |start, len| presence.wait_to_fill(&mem, GuestAddress(start), len);
        presence.set_missing();
        assert_eq!(fill(0x5008, 2 * PAGE), Ok(()));
        assert_eq!(written_pages(&mem), 1);
        presence.set_guarded(true);
        assert_eq!(fill(0x3008, 2 * PAGE), Ok(()));
        assert_eq!(fill(0xfff, 1), Ok(()));
        assert_eq!(fill(0, 0), Ok(()));
        assert_eq!(written_pages(&mem), 4);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x3008)).unwrap(), 0x5a);
        assert_eq!(fill(15 * 4096, PAGE + 1), Err(Unusable));
        presence.set_guarded(false);
        assert_eq!(fill(0x9000, PAGE), Ok(()));
        assert_eq!(written_pages(&mem), 4);
    }
}
