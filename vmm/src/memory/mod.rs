//! Guest RAM: allocated on the host, known to KVM.

pub mod dirty_log;
pub mod shadows;
mod slots;

use std::fs::File;
use std::os::fd::AsRawFd;

use devices::GuestMemory;
use kvm_ioctls::VmFd;
use ram::{GuestRegion, MmapRegion};
use snapshot::{PageSet, Piece};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::layout::{self, LayoutError};
use crate::kvm;
use dirty_log::DirtyLog;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is not possible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The host has not got it.
    #[error("cannot reserve {size} bytes of guest RAM: {source}")]
    Map {
        /// Bytes of the region.
        size: usize,
        /// What the host said.
        source: MmapRegionError,
    },
    /// The regions do not fit together.
    #[error("guest RAM regions: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// The host does not take it back.
    #[error("cannot clear guest RAM: {0}")]
    Discard(std::io::Error),
    /// KVM does not take it.
    #[error("guest RAM: {0}")]
    Kvm(#[from] kvm::Error),
}

/// What guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// The same in small pages, over which pieces of a file may be mapped by [`map_piece`].
    Mixed,
}

/// Where regions begin: at multiples of a large page, as they do in the guest. KVM maps a large page only where
/// both lie alike. Linux before 6.7 places large mappings anywhere.
const ALIGN: usize = 2 << 20;

/// Maps `size` bytes of guest RAM: private, given by the host as the guest touches it, in huge pages
/// where the host has them, and not part of a core dump or of a child process. It lives as long as the
/// process.
pub fn allocate(size: u64, kind: Kind) -> Result<GuestMemory, Error> {
    const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
    const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mut regions = Vec::new();
    for (start, size) in layout::ram_regions(size)? {
        let failed = |source| Error::Map { size, source };
        let at = map_aligned(size).map_err(|error| failed(MmapRegionError::Mmap(error)))?;
        // SAFETY: the range is the mapping just made, which is never unmapped.
        let mapping = unsafe { MmapRegion::build_raw(at, size, PROT, FLAGS) }.map_err(failed)?;
        advise(&mapping, kind);
        let region =
            GuestRegion::new(mapping, start).ok_or(failed(MmapRegionError::InvalidPointer))?;
        regions.push(region);
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Maps anonymous memory at a multiple of [`ALIGN`].
fn map_aligned(size: usize) -> std::io::Result<*mut u8> {
    const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
    const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
    let room = size.checked_add(ALIGN).ok_or_else(too_large)?;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), room, PROT, FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    let skip = start.addr().next_multiple_of(ALIGN) - start.addr();
    let at = start.cast::<u8>().wrapping_add(skip);
    give_back(start.cast(), skip);
    give_back(at.wrapping_add(size), ALIGN - skip);
    Ok(at)
}

/// Gives back an end of what [`map_aligned`] has mapped.
fn give_back(at: *mut u8, len: usize) {
    // SAFETY: the range is of the mapping just made, and nobody knows of it.
    if len > 0 && unsafe { libc::munmap(at.cast(), len) } != 0 {
        // Addresses are lost, and nothing else.
        tracing::debug!("munmap: {}", std::io::Error::last_os_error());
    }
}

/// Maps a piece of a file into RAM of [`Kind::Mixed`], private: what the guest writes stays its own.
/// The guest must not have run yet.
///
/// # Errors
/// The piece is not inside one region or not inside the file, or the host refuses.
pub fn map_piece(memory: &GuestMemory, file: &File, piece: Piece) -> std::io::Result<()> {
    let invalid = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidInput, what);
    let end = piece.host.checked_add(piece.len).ok_or_else(|| invalid("it ends nowhere"))?;
    // A page past the end of the file would be a SIGBUS.
    if end > file.metadata()?.len() {
        return Err(invalid("it goes past the end of the file"));
    }
    let region = memory.find_region(piece.guest).ok_or_else(|| invalid("it is not in RAM"))?;
    let offset = piece.guest.0 - region.start_addr().0;
    if region.len() - offset < piece.len {
        return Err(invalid("it is not inside a region"));
    }
    let len = usize::try_from(piece.len).map_err(|_| invalid("it is too long"))?;
    let host = i64::try_from(piece.host).map_err(|_| invalid("it is too far in the file"))?;
    let at = region.as_ptr().wrapping_add(usize::try_from(offset).unwrap_or(usize::MAX));
    MmapRegion::bitmap(region).set_pieces(true);
    // SAFETY: the range was just checked to be inside a region of RAM, which is mapped as long as the
    // process lives and to which there are no Rust references; the guest does not use it yet.
    unsafe { remap(at, len, 0, Some((file, host))) }
}

/// Puts anonymous memory in the place of all regions that have pieces of files; they read as zeroes then. The vCPUs
/// and devices must be paused, and nobody may watch this memory.
pub fn replace_pieces(memory: &GuestMemory) -> Result<(), Error> {
    for region in memory.iter() {
        replace_pieces_of(region)?;
    }
    Ok(())
}

/// The same for one region; false if it has none.
fn replace_pieces_of(region: &GuestRegion) -> Result<bool, Error> {
    let record = MmapRegion::bitmap(region);
    if !record.has_pieces() {
        return Ok(false);
    }
    // SAFETY: the range is guest RAM, whose contents are about to be replaced.
    unsafe { remap(region.as_ptr(), region.size(), libc::MAP_ANONYMOUS, None) }
        .map_err(Error::Discard)?;
    record.set_pieces(false);
    Ok(true)
}

/// Maps private memory over what is there: of a file, or anonymous; that is in small pages, as all of [`Kind::Mixed`].
///
/// # Safety
/// The range must be memory that may be replaced at any time, such as guest RAM.
unsafe fn remap(
    at: *mut u8,
    len: usize,
    flags: i32,
    file: Option<(&File, i64)>,
) -> std::io::Result<()> {
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the caller's promise.
    let answer = unsafe {
        libc::mmap(at.cast(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset)
    };
    if answer == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    let of_anonymous = file.is_none().then_some(libc::MADV_NOHUGEPAGE);
    for advice in of_anonymous.into_iter().chain([libc::MADV_DONTDUMP, libc::MADV_DONTFORK]) {
        // SAFETY: the range was just mapped; none of these advices changes its contents.
        if unsafe { libc::madvise(at.cast(), len, advice) } != 0 {
            tracing::debug!("madvise {advice}: {}", std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Asks for huge pages, and for no copy in dumps and children. These are wishes: a host that has
/// none of it runs the guest all the same.
fn advise(mapping: &MmapRegion, kind: Kind) {
    let pages = match kind {
        Kind::Anonymous => libc::MADV_HUGEPAGE,
        // Forks are many, and each is to take no more memory than it writes.
        Kind::Mixed => libc::MADV_NOHUGEPAGE,
    };
    for advice in [pages, libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: the range is the mapping just made; none of these advices changes its contents.
        let answer = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
        if answer != 0 {
            tracing::debug!("madvise {advice}: {}", std::io::Error::last_os_error());
        }
    }
}

/// Makes KVM forget what it derived from the contents of RAM, after the host has replaced them. The
/// vCPUs must be paused.
///
/// KVM without nested paging would go on with translations of the former guest. All of them go with the
/// memory slots, and so does what was logged: whoever needs it collects it before. With `logged`
/// pages are logged afterwards, beginning with none. Where the host has changed some pages only,
/// [`shadows::Shadows`] leaves the log as it is.
pub fn forget_translations(
    vm: &VmFd,
    memory: &GuestMemory,
    log: &mut DirtyLog,
    logged: bool,
) -> Result<(), Error> {
    for region in memory.iter() {
        MmapRegion::bitmap(region).written().reset();
    }
    Ok(log.make_anew(vm, memory, logged)?)
}

/// As [`forget_translations`], logged afterwards but for the regions in `untold`, to which KVM can give
/// large pages. What the host wrote, and does not write to the log, stays noted.
pub fn forget_and_cut(
    vm: &VmFd,
    memory: &GuestMemory,
    log: &mut DirtyLog,
    untold: &PageSet,
) -> Result<(), Error> {
    collapse(memory, untold);
    Ok(log.make_anew_without(vm, memory, untold)?)
}

/// Puts parts of RAM in huge pages of the host, where it can: a wish. RAM of [`Kind::Mixed`] refuses it, but pieces of
/// files would not.
fn collapse(memory: &GuestMemory, parts: &PageSet) {
    for run in parts.runs() {
        let Some(region) = memory.iter().nth(run.region) else { continue };
        let (Ok(offset), Ok(len)) = (usize::try_from(run.offset()), usize::try_from(run.len()))
        else {
            continue;
        };
        let outside = offset.checked_add(len).is_none_or(|end| end > region.size());
        if outside || MmapRegion::bitmap(region).has_pieces() {
            continue;
        }
        let at = region.as_ptr().wrapping_add(offset);
        // SAFETY: the range was just checked to be inside a live mapping; its contents stay.
        let answer = unsafe { libc::madvise(at.cast(), len, libc::MADV_COLLAPSE) };
        if answer != 0 {
            tracing::debug!("no huge pages for {run:?}: {}", std::io::Error::last_os_error());
        }
    }
}

/// Makes all RAM read as zeroes by giving it back to the host. The vCPUs must be paused.
pub fn discard(memory: &GuestMemory) -> Result<(), Error> {
    for region in memory.iter() {
        // What is mapped of a file would come back.
        if replace_pieces_of(region)? {
            continue;
        }
        // SAFETY: the range is a live private anonymous mapping, to which no Rust reference exists;
        // the guest, which alone relies on its contents, is paused and about to be reset.
        let answer =
            unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTNEED) };
        if answer != 0 {
            return Err(Error::Discard(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use snapshot::fault::LazyHost;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn what_is_mapped_of_a_file_is_there_until_anonymous_memory_takes_its_place() {
        const LEN: u64 = 1 << 16;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 2 << 16]).unwrap();
        for replace in [replace_pieces, discard] {
            let memory = allocate(33 << 20, Kind::Mixed).unwrap();
            assert!(LazyHost::can_serve(&memory));
            let (guest, own) = (GuestAddress(1 << 20), GuestAddress(3 << 20));
            map_piece(&memory, &file, Piece { guest, len: LEN, host: LEN }).unwrap();
            memory.write_obj(1_u64, own).unwrap();
            assert!(!LazyHost::can_serve(&memory));
            assert_eq!(memory.read_obj::<u8>(guest).unwrap(), 7);
            replace(&memory).unwrap();
            assert!(LazyHost::can_serve(&memory));
            assert_eq!(memory.read_obj::<u64>(guest).unwrap(), 0);
            assert_eq!(memory.read_obj::<u64>(own).unwrap(), 0);
        }
    }

    #[test]
    fn regions_begin_at_multiples_of_a_large_page_whatever_their_size() {
        const MIB: u64 = 1 << 20;
        for size in [33 * MIB, 35 * MIB + 4096, 64 * MIB, (3 << 30) + 5 * MIB] {
            for kind in [Kind::Anonymous, Kind::Mixed] {
                let memory = allocate(size, kind).unwrap();
                assert_eq!(memory.iter().map(GuestMemoryRegion::len).sum::<u64>(), size);
                for region in memory.iter() {
                    assert!(region.as_ptr().addr().is_multiple_of(ALIGN), "{size:#x}");
                    let last = GuestAddress(region.start_addr().0 + region.len() - 8);
                    memory.write_obj(7_u64, last).unwrap();
                }
            }
        }
    }
}
