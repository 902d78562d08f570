//! How a vCPU thread is brought out of the guest.
//!
//! The kicker sets `kvm_run.immediate_exit`, then signals the thread. Whether the thread is in
//! KVM_RUN (the signal interrupts it), about to enter it (the flag makes it return at once) or
//! elsewhere (the flag waits for the next KVM_RUN), KVM_RUN returns EINTR once after every kick.

use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The flag of one vCPU. The `VcpuFd` it was made from must outlive it; the owner of both is the
/// vCPU's thread handle, which gets the `VcpuFd` back only when the thread is joined.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImmediateExit {
    flag: *const AtomicU8,
}

// SAFETY: the pointer leads to an atomic in memory that stays mapped as long as the VcpuFd lives;
// nothing about it is tied to a thread.
unsafe impl Send for ImmediateExit {}
// SAFETY: as for Send; all access is atomic.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// The flag in `vcpu`'s run structure.
    pub(super) fn of(vcpu: &mut VcpuFd) -> Self {
        Self { flag: (&raw mut vcpu.get_kvm_run().immediate_exit).cast::<AtomicU8>().cast_const() }
    }

    fn get(self) -> &'static AtomicU8 {
        // SAFETY: the field is a u8 inside the mmap'ed kvm_run, valid while the VcpuFd lives, which
        // the type's contract ensures; the kernel and we access it as a single byte.
        unsafe { &*self.flag }
    }

    /// Makes KVM_RUN return EINTR at once.
    pub(super) fn set(self) {
        self.get().store(1, Ordering::SeqCst);
    }

    /// Lets KVM_RUN enter the guest again.
    pub(super) fn clear(self) {
        self.get().store(0, Ordering::SeqCst);
    }
}

extern "C" fn interrupt_only(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal that interrupts KVM_RUN; its handler does nothing.
pub(super) fn kick_signal() -> libc::c_int {
    static REGISTER: Once = Once::new();
    REGISTER.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), interrupt_only) {
            tracing::error!("cannot register the signal that stops vCPUs: {error}");
        }
    });
    SIGRTMIN()
}
