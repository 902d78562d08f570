//! Guest RAM: allocated on the host, known to KVM.

pub mod dirty_log;

use devices::GuestMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::layout::{self, LayoutError};
use crate::kvm;
use dirty_log::{Begin, DirtyLog};

type GuestRegion = vm_memory::GuestRegionMmap<AtomicBitmap>;
type MmapRegion = vm_memory::MmapRegion<AtomicBitmap>;

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
        source: vm_memory::mmap::MmapRegionError,
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

/// Maps `size` bytes of guest RAM: private and anonymous, given by the host as the guest touches it,
/// in huge pages where the host has them, and not part of a core dump or of a child process.
pub fn allocate(size: u64) -> Result<GuestMemory, Error> {
    let mut regions = Vec::new();
    for (start, size) in layout::ram_regions(size)? {
        let mapping = MmapRegion::build(
            None,
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|source| Error::Map { size, source })?;
        advise(&mapping);
        let region = GuestRegion::new(mapping, start)
            .ok_or(Error::Map { size, source: vm_memory::mmap::MmapRegionError::InvalidPointer })?;
        regions.push(region);
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Asks for huge pages, and for no copy in dumps and children. These are wishes: a host that has
/// none of it runs the guest all the same.
fn advise(mapping: &MmapRegion) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: the range is the mapping just made; none of these advices changes its contents.
        let answer = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
        if answer != 0 {
            tracing::debug!("madvise {advice}: {}", std::io::Error::last_os_error());
        }
    }
}

/// Tells KVM of all RAM, one memory slot a region, not logged.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    set_slots(vm, memory, 0, GuestMemoryRegion::len)
}

/// Lets KVM log which pages are written from now on. The first collection may give all of them. Slots
/// that are logged already stay as they are.
pub fn start_log(vm: &VmFd, memory: &GuestMemory, log: &mut DirtyLog) -> Result<(), Error> {
    if log.is_on() {
        return Ok(());
    }
    log.set_begin(vm, Begin::Full)?;
    set_slots(vm, memory, KVM_MEM_LOG_DIRTY_PAGES, GuestMemoryRegion::len)?;
    log.set_on(true);
    Ok(())
}

/// Makes KVM forget what it derived from the contents of RAM, after the host has replaced them. The
/// vCPUs must be paused.
///
/// A KVM without nested paging shadows the guest's page tables. It sees the guest's writes to them,
/// not the host's, and would go on with translations of the former guest. All of them go with the
/// memory slots, and so does what was logged: whoever needs it collects it before. With `logged`
/// pages are logged afterwards, beginning with none.
pub fn forget_translations(
    vm: &VmFd,
    memory: &GuestMemory,
    log: &mut DirtyLog,
    logged: bool,
) -> Result<(), Error> {
    set_slots(vm, memory, 0, |_| 0)?;
    for region in memory.iter() {
        MmapRegion::bitmap(region).reset();
    }
    log.set_begin(vm, Begin::Empty)?;
    let flags = if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    set_slots(vm, memory, flags, GuestMemoryRegion::len)?;
    log.set_on(logged);
    Ok(())
}

/// Sets the memory slot of each region; a size of 0 removes it.
fn set_slots(
    vm: &VmFd,
    memory: &GuestMemory,
    flags: u32,
    size: impl Fn(&GuestRegion) -> u64,
) -> Result<(), Error> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: size(region),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a live mapping of at least that size. The machine keeps the memory
        // until the VM is gone, and each region has a slot of its own.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|source| kvm::Error::Ioctl { call: "KVM_SET_USER_MEMORY_REGION", source })?;
    }
    Ok(())
}

/// Makes all RAM read as zeroes by giving it back to the host. The vCPUs must be paused.
pub fn discard(memory: &GuestMemory) -> Result<(), Error> {
    for region in memory.iter() {
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
