//! Emptying guest RAM quickly, whatever its size.
//!
//! Giving gigabytes back to the host page by page takes long. Here the page tables are moved to
//! another place at once. What is there can be used as memory for what guest RAM is to hold next, and
//! the rest is given back in the background.

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

/// Pages that were guest RAM, in order of the address they had there. Dropping it gives them back, in
/// the background.
#[derive(Default)]
#[must_use = "the pages are given back when this is dropped"]
pub(crate) struct FormerRam(Vec<Mapping>);

/// A mapping that only [`FormerRam`] knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    /// Host address that its first byte had in guest RAM.
    ram: usize,
    /// Host address it has now.
    start: usize,
    len: usize,
}

impl Mapping {
    fn end(&self) -> usize {
        self.ram + self.len
    }

    /// The part that was at `from` to `end` in guest RAM.
    fn part(&self, from: usize, end: usize) -> Self {
        Self { ram: from, start: self.start + (from - self.ram), len: end - from }
    }
}

impl FormerRam {
    /// Takes all pages of `slices` away: they are zero, or missing where that is watched. The vCPUs
    /// are stopped, and nobody relies on the contents.
    pub(crate) fn take(slices: &[RamSlice<'_>]) -> io::Result<Self> {
        let mut former = Self::default();
        for slice in slices {
            take(slice, 0, slice.len(), &mut former.0)?;
        }
        former.0.sort_unstable_by_key(|mapping| mapping.ram);
        Ok(former)
    }

    /// Gives back all but what was in these ranges of guest RAM: host address and length.
    pub(crate) fn keep(mut self, ranges: &[(usize, u64)]) -> Self {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        let (mut kept, mut rest) = (Vec::new(), Vec::new());
        for mapping in std::mem::take(&mut self.0) {
            let mut from = mapping.ram;
            let first = ranges.partition_point(|&(start, len)| start + index(len) <= from);
            let within = ranges[first..].iter().take_while(|(start, _)| *start < mapping.end());
            for &(start, len) in within {
                let (start, end) = (start.max(from), (start + index(len)).min(mapping.end()));
                rest.push(mapping.part(from, start));
                kept.push(mapping.part(start, end));
                from = end;
            }
            rest.push(mapping.part(from, mapping.end()));
        }
        rest.retain(|part| part.len > 0);
        drop(Self(rest));
        Self(kept)
    }

    /// Where the bytes are now that were at a host address of guest RAM; none if they are not there in
    /// one piece. They are mapped as long as this lives, and nobody uses them but who asks for them here.
    pub(crate) fn place(&self, ram: usize, len: u64) -> Option<*mut u8> {
        let after = self.0.partition_point(|mapping| mapping.ram <= ram);
        let mapping = self.0.get(after.checked_sub(1)?)?;
        let end = ram.checked_add(index(len))?;
        (end <= mapping.end())
            .then(|| ptr::with_exposed_provenance_mut(mapping.start + (ram - mapping.ram)))
    }
}

/// What the kernel refuses to move in one piece, because it is mapped in several, is cut in two;
/// small rests are given back the slow way.
fn take(slice: &RamSlice<'_>, offset: u64, len: u64, taken: &mut Vec<Mapping>) -> io::Result<()> {
    if let Ok(mapping) = move_away(slice, offset, len) {
        taken.push(mapping);
        return Ok(());
    }
    if len <= LEAST {
        return slice.drop_pages(offset, len);
    }
    let half = (len / 2).next_multiple_of(LEAST);
    take(slice, offset, half, taken)?;
    take(slice, offset + half, len - half, taken)
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
    let reserved = reserved.expose_provenance();
    // The same place within the largest page table as where it comes from.
    let skip = (from.addr() % ALIGN + ALIGN - reserved % ALIGN) % ALIGN;
    let to = reserved + skip;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: the source stays mapped, anonymous and private, and only loses contents that nobody
    // relies on; the target is within the reservation above, which nobody else knows.
    let moved = unsafe {
        let to = ptr::with_exposed_provenance_mut::<libc::c_void>(to);
        libc::mremap(from.cast(), len, len, flags, to)
    };
    let error = (moved == libc::MAP_FAILED).then(io::Error::last_os_error);
    unmap(reserved, skip);
    unmap(to + len, room - skip - len);
    match error {
        None => Ok(Mapping { ram: from.addr(), start: to, len }),
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

impl Drop for FormerRam {
    fn drop(&mut self) {
        let rest = Rest(std::mem::take(&mut self.0));
        if !rest.0.is_empty() {
            // Where there is no thread to be had, they are given back here.
            let _ = thread::Builder::new().name("former-ram".to_owned()).spawn(move || drop(rest));
        }
    }
}

/// What is to be given back.
struct Rest(Vec<Mapping>);

impl Drop for Rest {
    fn drop(&mut self) {
        for mapping in &self.0 {
            for done in (0..mapping.len).step_by(STEP) {
                unmap(mapping.start + done, STEP.min(mapping.len - done));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::GuestMemory;
    use crate::memory::slices;

    const LEN: usize = 8 << 20;

    #[test]
    fn what_was_ram_is_found_elsewhere_and_only_what_is_kept() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap();
        for mib in 0..8_u64 {
            memory.write_obj(mib + 1, GuestAddress(mib << 20)).unwrap();
        }
        let ram = slices(&memory);
        let host = ram[0].host(0, 0).addr();
        let former = FormerRam::take(&ram).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(3 << 20)).unwrap(), 0);
        let former = former.keep(&[(host + (6 << 20), MIB), (host + (2 << 20), 2 * MIB)]);
        let found = |mib: usize, len| {
            let place = former.place(host + (mib << 20), len)?;
            // SAFETY: the place is mapped while `former` lives.
            Some(unsafe { place.cast::<u64>().read() })
        };
        assert_eq!([found(2, 2 * MIB), found(3, MIB), found(6, MIB)], [Some(3), Some(4), Some(7)]);
        assert_eq!([found(1, MIB), found(3, 2 * MIB), found(6, 2 * MIB), found(7, 1)], [None; 4]);
    }
}
