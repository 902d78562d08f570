//! Where KVM writes to RAM as vCPUs are restored.
//!
//! A guest that wants to know the time of day names a place in its RAM with an MSR, and KVM writes to it there and
//! then (Linux's `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_WALL_CLOCK). Restoring the MSR has KVM do so
//! once more. The guest has not asked again, and may have something else there by now.

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::state::MachineState;

/// `struct pvclock_wall_clock`: version, seconds, nanoseconds.
const SIZE: usize = 12;

/// What RAM has in these places.
pub(super) struct WallClocks(Vec<(GuestAddress, [u8; SIZE])>);

impl WallClocks {
    /// Notes what RAM has where vCPUs that are restored to `state` have KVM write.
    pub(super) fn note(memory: &GuestMemory, state: &MachineState) -> Self {
        let mut places: Vec<u64> =
            state.vcpus.iter().flat_map(|vcpu| vcpu.wall_clocks()).filter(|at| *at != 0).collect();
        places.sort_unstable();
        places.dedup();
        let contents = |at| {
            let mut bytes = [0; SIZE];
            let read = memory.read_slice(&mut bytes, GuestAddress(at));
            // Where there is no RAM, KVM does not write either.
            read.is_ok().then_some((GuestAddress(at), bytes))
        };
        Self(places.into_iter().filter_map(contents).collect())
    }

    /// Puts it back.
    pub(super) fn put_back(self, memory: &GuestMemory) {
        for (at, bytes) in self.0 {
            // It was read there.
            if let Err(error) = memory.write_slice(&bytes, at) {
                tracing::error!("RAM at {:#x} is not as it was: {error}", at.0);
            }
        }
    }
}
