//! Emptying guest RAM quickly, whatever its size.
//!
//! Giving gigabytes back to the host page by page takes long. Here the page tables are moved to
//! another place at once, and what is there is given back in the background.

use std::io;
use std::ptr;
use std::thread;

use super::RamSlice;
use crate::units::{MIB, index};

/// Largest alignment at which the kernel moves page tables instead of pages.
const ALIGN: usize = 1 << 30;
/// Smallest range that is tried to be moved.
const LEAST: u64 = 2 * MIB;
/// Bytes given back at a time: the lock of the address space is held meanwhile.
const STEP: usize = 32 << 20;

/// Pages that were guest RAM. Dropping it gives them back, in the background.
#[must_use = "the pages are given back when this is dropped"]
pub(crate) struct FormerRam(Vec<Mapping>);

/// A mapping that nothing uses.
struct Mapping {
    start: usize,
    len: usize,
}

/// Takes all pages of `slices` away: they are zero, or missing where that is watched. The vCPUs are
/// stopped, and nobody relies on the contents.
pub(crate) fn empty(slices: &[RamSlice<'_>]) -> io::Result<FormerRam> {
    let mut former = FormerRam(Vec::new());
    for slice in slices {
        take(slice, 0, slice.len(), &mut former)?;
    }
    Ok(former)
}

/// What the kernel refuses to move in one piece, because it is mapped in several, is cut in two;
/// small rests are given back the slow way.
fn take(slice: &RamSlice<'_>, offset: u64, len: u64, former: &mut FormerRam) -> io::Result<()> {
    if let Ok(mapping) = move_away(slice, offset, len) {
        former.0.push(mapping);
        return Ok(());
    }
    if len <= LEAST {
        return slice.drop_pages(offset, len);
    }
    let half = (len / 2).next_multiple_of(LEAST);
    take(slice, offset, half, former)?;
    take(slice, offset + half, len - half, former)
}

fn move_away(slice: &RamSlice<'_>, offset: u64, len: u64) -> io::Result<Mapping> {
    let from = slice.host(offset, len);
    let len = index(len);
    let room = len + ALIGN;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let reserved = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0)
    };
    if reserved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let reserved = reserved.addr();
    // The same place within the largest page table as where it comes from.
    let skip = (from.addr() % ALIGN + ALIGN - reserved % ALIGN) % ALIGN;
    let to = reserved + skip;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: the source stays mapped, anonymous and private, and only loses contents that nobody
    // relies on; the target is within the reservation above, which nobody else knows.
    let moved = unsafe {
        libc::mremap(from.cast(), len, len, flags, ptr::without_provenance_mut::<libc::c_void>(to))
    };
    let error = (moved == libc::MAP_FAILED).then(io::Error::last_os_error);
    unmap(reserved, skip);
    unmap(to + len, room - skip - len);
    match error {
        None => Ok(Mapping { start: to, len }),
        Some(error) => {
            unmap(to, len);
            Err(error)
        }
    }
}

fn unmap(start: usize, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: the range is of a mapping that this module made and that nobody uses.
    let answer = unsafe { libc::munmap(ptr::without_provenance_mut(start), len) };
    if answer != 0 {
        // Memory is lost, and nothing else.
        tracing::warn!("former guest memory is not given back: {}", io::Error::last_os_error());
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        for done in (0..self.len).step_by(STEP) {
            unmap(self.start + done, STEP.min(self.len - done));
        }
    }
}

impl Drop for FormerRam {
    fn drop(&mut self) {
        let mappings = std::mem::take(&mut self.0);
        // Where there is no thread to be had, they are dropped here.
        let _ = thread::Builder::new().name("former-ram".to_owned()).spawn(move || drop(mappings));
    }
}
