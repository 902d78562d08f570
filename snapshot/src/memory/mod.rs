//! Guest RAM as the host sees it, without a Rust reference to any of it.

mod copies;
mod former;
mod pagemap;
mod zero;

use std::io;

use block::{ReadBuf, WriteBuf};
use ram::{GuestRegion, MmapRegion};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub(crate) use copies::Copies;
pub(crate) use former::FormerRam;
pub(crate) use pagemap::Pagemap;
pub(crate) use zero::page_is_zero;

use crate::GuestMemory;
use crate::units::{PAGE, index};

/// One region of guest RAM, borrowed from the guest memory that keeps it mapped.
pub(crate) struct RamSlice<'a> {
    region: &'a GuestRegion,
}

/// The RAM regions in order of guest physical address.
pub(crate) fn slices(memory: &GuestMemory) -> Vec<RamSlice<'_>> {
    memory.iter().map(|region| RamSlice { region }).collect()
}

/// The RAM regions as a layout takes them.
pub(crate) fn ranges(memory: &GuestMemory) -> Vec<(GuestAddress, u64)> {
    let range = |region: &GuestRegion| (region.start_addr(), region.len());
    memory.iter().map(range).collect()
}

impl<'a> RamSlice<'a> {
    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.region.len()
    }

    /// Whether untouched pages are known to be zero and dropped ones become so: anonymous private
    /// memory, with no pieces of files over it. Of a file or of shared memory, pages may hold data without being
    /// mapped here; of memory in huge pages, `MADV_DONTNEED` quietly leaves a last part that is not a whole one.
    pub(crate) fn is_anonymous(&self) -> bool {
        let flags = self.region.flags();
        flags & libc::MAP_ANONYMOUS != 0
            && flags & libc::MAP_PRIVATE != 0
            && flags & libc::MAP_HUGETLB == 0
            && self.region.file_offset().is_none()
            && !MmapRegion::bitmap(self.region).has_pieces()
    }

    /// Host address of the byte at `offset`.
    ///
    /// Panics if it is past the end, which would be an error of this crate.
    pub(crate) fn host(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len()));
        self.region.as_ptr().wrapping_add(index(offset))
    }

    /// The bytes for the host to write to an image.
    pub(crate) fn write_buf(&self, offset: u64, len: u64) -> WriteBuf<'a> {
        // SAFETY: `host` checked that the range is inside the region, which stays mapped while
        // guest memory is borrowed.
        unsafe { WriteBuf::from_raw(self.host(offset, len), index(len)) }
    }

    /// The bytes for the host to fill from an image.
    pub(crate) fn read_buf(&self, offset: u64, len: u64) -> ReadBuf<'a> {
        // SAFETY: as for `write_buf`; vm-memory hands out no references to guest memory.
        unsafe { ReadBuf::from_raw(self.host(offset, len), index(len)) }
    }

    /// Replaces the bytes from `offset` on.
    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) {
        let to = self.host(offset, bytes.len() as u64);
        // SAFETY: `host` checked that the range is inside the mapped region; the bytes are the
        // caller's own, as no reference to guest memory exists.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Makes the bytes zero, giving their pages back to the host where that does it.
    pub(crate) fn clear(&self, offset: u64, len: u64) {
        if !(self.is_anonymous() && self.drop_pages(offset, len).is_ok()) {
            // SAFETY: `host` checked that the range is inside the mapped region.
            unsafe { self.host(offset, len).write_bytes(0, index(len)) };
        }
    }

    /// Fails where pages are locked; nothing is lost by that.
    fn drop_pages(&self, offset: u64, len: u64) -> io::Result<()> {
        if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = self.host(offset, len).cast();
        // SAFETY: the range is inside a mapping of whole pages that this process owns; its
        // contents are meant to be lost.
        match unsafe { libc::madvise(at, index(len), libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests;
