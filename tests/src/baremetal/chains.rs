//! Two vCPUs of the bare-metal guest that count all the time, one on the disk and one in memory, and look
//! whether all that they read is of one moment: `chain` and `disk_chain` in `guest.s`.

use super::layout::{FREE, SCRATCH};
use super::virtio::{DISK_COUNT, Driver};
use super::{Monitor, Routine, apic};

/// The word that ends them.
const STOP: u64 = SCRATCH + 0x8000;

/// The chains of a guest with three vCPUs and a disk in slot 0.
#[derive(Debug, Clone, Copy)]
pub struct Chains {
    /// Pages of memory that are counted in.
    pub pages: u64,
}

impl Chains {
    /// Lets vCPU 1 count on the disk and vCPU 2 in memory.
    pub fn start(self, guest: &mut Monitor) {
        for vcpu in 1..=2 {
            apic::start_vcpu(guest, vcpu);
        }
        guest.poke(STOP, 0);
        Driver::start(guest).prepare_chain();
        guest.start_on(1, Routine::DiskChain, &[STOP, SCRATCH]);
        guest.start_on(2, Routine::User, &[Routine::Chain as u64, FREE, self.pages, STOP]);
        self.go_on(guest);
    }

    /// Waits until every page and the disk were looked at and written.
    pub fn go_on(self, guest: &mut Monitor) {
        let disk = guest.peek(DISK_COUNT);
        self.memory_goes_on(guest);
        guest.wait_word(DISK_COUNT, |now| now > disk + 2);
    }

    /// The same for memory alone: the one on the disk ends at the first request that fails.
    pub fn memory_goes_on(self, guest: &mut Monitor) {
        let memory = guest.peek(FREE);
        guest.wait_word(FREE, |now| now > memory + 2 * self.pages);
    }

    /// Ends them; they found nothing wrong.
    pub fn stop(self, guest: &mut Monitor) {
        guest.poke(STOP, 1);
        assert_eq!(guest.answer_of(1), 0, "the disk is not of the same moment as memory");
        assert_eq!(guest.answer_of(2), 0, "a page is not of the same moment as the others");
    }
}
