//! What KVM derives from guest RAM, and having it forget that.
//!
//! For each page that the guest has touched KVM keeps where the host has it; without nested paging also a
//! shadow of the guest's own page tables. It follows the host's mappings by itself, page by page, and the
//! guest's writes to its page tables, but not the host's.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::MmapRegion;

use super::Error;
use crate::boot::layout;
use crate::kvm::IoctlContext;

/// Has KVM forget what it derived from RAM, while its memory slots and its log stay.
#[derive(Debug)]
pub struct Shadows {
    vm: Arc<VmFd>,
    /// A slot that RAM never has.
    slot: u32,
    page: MmapRegion<()>,
}

impl Shadows {
    /// Takes the last memory slot of the VM for itself.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>) -> Result<Self, Error> {
        let last = kvm.get_nr_memslots().saturating_sub(1);
        let slot = u32::try_from(last).unwrap_or(u32::MAX);
        let size = usize::try_from(layout::PAGE_SIZE).unwrap_or_default();
        let page = MmapRegion::new(size).map_err(|source| Error::Map { size, source })?;
        Ok(Self { vm, slot, page })
    }

    /// Forgets all of it. The guest may run, and then finds its pages again one by one.
    ///
    /// KVM drops all of its shadow page tables when any memory slot goes, so one is made for that, at a
    /// place where the guest has nothing. That takes as long as there are pages: some 13 ms for each GiB
    /// of them; and as long as a vCPU waits inside KVM for a page that a lazy load has not read. One caller
    /// at a time: a load, or a rewind, of which there is one.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn forget(&self) -> Result<(), Error> {
        for memory_size in [layout::PAGE_SIZE, 0] {
            let slot = kvm_userspace_memory_region {
                slot: self.slot,
                flags: 0,
                guest_phys_addr: layout::KVM_RESERVED_END,
                memory_size,
                userspace_addr: self.page.as_ptr() as u64,
            };
            // SAFETY: the slot is of a mapping that lives as long as `self`, and it is gone again when
            // this returns, or the VM does not take it.
            unsafe { self.vm.set_user_memory_region(slot) }.ioctl("KVM_SET_USER_MEMORY_REGION")?;
        }
        Ok(())
    }
}
