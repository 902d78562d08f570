//! Memory slots of RAM: which part of it KVM knows under which number, and of which it logs the writes.
//!
//! Usually each region is one slot. Parts of RAM that are not logged while the rest is are slots of
//! their own.
//!
//! Slots are made and removed only while the vCPUs are paused: what a guest finds without a slot is no
//! memory to it. The flag that a slot is logged may come at any time.

use devices::GuestMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use snapshot::{PAGE_SIZE, PageRun, PageSet};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::{self, IoctlContext};

/// What KVM tells of the writes to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writes {
    /// Nothing: every page counts as written, always.
    Untold,
    /// It logs them since a moment ago: every page counts as written once more.
    Begun,
    /// It logs them.
    Logged,
}

/// A part of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) run: PageRun,
    pub(super) writes: Writes,
}

/// All slots of RAM, as KVM has them; the number of a slot is its place here.
#[derive(Debug, Default)]
pub(super) struct Slots(Vec<Slot>);

impl Slots {
    /// The slots, by number.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Slot)> {
        (0..).zip(&mut self.0)
    }

    /// A number that no slot has.
    fn free(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// Removes all slots, and with them all that KVM knows of RAM, its log too.
    pub(super) fn remove(&mut self, vm: &VmFd, memory: &GuestMemory) -> kvm::Result<()> {
        while let Some(slot) = self.0.last() {
            set(vm, memory, self.free() - 1, slot, Some(0))?;
            self.0.pop();
        }
        Ok(())
    }

    /// Makes slots of parts of RAM that do not overlap, where there are none.
    pub(super) fn make(
        &mut self,
        vm: &VmFd,
        memory: &GuestMemory,
        slots: impl IntoIterator<Item = Slot>,
    ) -> kvm::Result<()> {
        for slot in slots {
            set(vm, memory, self.free(), &slot, None)?;
            self.0.push(slot);
        }
        Ok(())
    }

    /// Has all slots logged. The guest may run.
    pub(super) fn begin(&mut self, vm: &VmFd, memory: &GuestMemory) -> kvm::Result<()> {
        for (number, slot) in self.iter_mut().filter(|(_, slot)| slot.writes == Writes::Untold) {
            let begun = Slot { writes: Writes::Begun, ..*slot };
            set(vm, memory, number, &begun, None)?;
            *slot = begun;
        }
        Ok(())
    }
}

/// One slot for each region.
pub(super) fn whole(memory: &GuestMemory, writes: Writes) -> impl Iterator<Item = Slot> {
    let pages = memory.iter().map(|region| region.len() / PAGE_SIZE).enumerate();
    pages.map(move |(region, count)| Slot { run: PageRun { region, first: 0, count }, writes })
}

/// Slots for all of RAM, of which the parts in `untold` are not logged.
pub(super) fn cut(untold: &PageSet) -> Vec<Slot> {
    let mut slots = Vec::new();
    for (region, pages) in untold.regions().enumerate() {
        let mut from = 0;
        let logged = |from: u64, end: u64| {
            let run = PageRun { region, first: from, count: end - from };
            (run.count > 0).then_some(Slot { run, writes: Writes::Logged })
        };
        for run in untold.runs_in(PageRun { region, first: 0, count: pages }) {
            slots.extend(logged(from, run.first));
            slots.push(Slot { run, writes: Writes::Untold });
            from = run.end();
        }
        slots.extend(logged(from, pages));
    }
    slots
}

/// Sets a slot; a size of 0 removes it.
fn set(
    vm: &VmFd,
    memory: &GuestMemory,
    number: u32,
    slot: &Slot,
    size: Option<u64>,
) -> kvm::Result<()> {
    const CALL: &str = "KVM_SET_USER_MEMORY_REGION";
    let end = slot.run.end().saturating_mul(PAGE_SIZE);
    let region = memory.iter().nth(slot.run.region).filter(|region| end <= region.len());
    let region = region.ok_or(kvm_ioctls::Error::new(libc::EINVAL)).ioctl(CALL)?;
    let offset = slot.run.offset();
    let logged = slot.writes != Writes::Untold;
    let slot = kvm_userspace_memory_region {
        slot: number,
        flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.start_addr().0 + offset,
        memory_size: size.unwrap_or(slot.run.len()),
        userspace_addr: region.as_ptr() as u64 + offset,
    };
    // SAFETY: the range was just seen to be inside a region, which is a live mapping. The machine keeps
    // the memory until the VM is gone, and no two slots are of the same part of it.
    unsafe { vm.set_user_memory_region(slot) }.ioctl(CALL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(region: usize, first: u64, count: u64) -> PageRun {
        PageRun { region, first, count }
    }

    fn cut_of(untold: &[PageRun]) -> Vec<(PageRun, Writes)> {
        let mut set = PageSet::empty([4096, 1000]);
        for run in untold {
            set.insert(*run);
        }
        cut(&set).into_iter().map(|slot| (slot.run, slot.writes)).collect()
    }

    #[test]
    fn without_hot_parts_each_region_is_a_slot() {
        let all = [(run(0, 0, 4096), Writes::Logged), (run(1, 0, 1000), Writes::Logged)];
        assert_eq!(cut_of(&[]), all);
    }

    #[test]
    fn slots_of_hot_parts_lie_between_the_others_and_cover_all_of_ram() {
        let slots = cut_of(&[run(0, 512, 512), run(0, 1024, 512), run(0, 3584, 512)]);
        let expected = [
            (run(0, 0, 512), Writes::Logged),
            (run(0, 512, 1024), Writes::Untold),
            (run(0, 1536, 2048), Writes::Logged),
            (run(0, 3584, 512), Writes::Untold),
            (run(1, 0, 1000), Writes::Logged),
        ];
        assert_eq!(slots, expected);
        let slots = cut_of(&[run(0, 0, 4096), run(1, 512, 488)]);
        let expected = [
            (run(0, 0, 4096), Writes::Untold),
            (run(1, 0, 512), Writes::Logged),
            (run(1, 512, 488), Writes::Untold),
        ];
        assert_eq!(slots, expected);
    }
}
