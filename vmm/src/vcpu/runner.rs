//! The loop of a vCPU thread.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Command, EventSink, ImmediateExit, VcpuEvent};
use crate::bus::Bus;
use crate::kvm::vcpu_state::{CaptureInfo, VcpuState};

pub(super) struct Runner {
    vcpu: VcpuFd,
    commands: Receiver<Command>,
    immediate_exit: ImmediateExit,
    info: Arc<CaptureInfo>,
    bus: Arc<Bus>,
    events: EventSink,
    running: bool,
}

/// What became of one KVM_RUN.
enum Ran {
    /// An exit was handled; the guest goes on.
    Handled,
    /// A kick or a stray signal.
    Interrupted,
    /// The vCPU cannot go on.
    Stopped(VcpuEvent),
}

/// What the loop does after a command.
enum Next {
    Continue,
    Exit,
}

impl Runner {
    pub(super) fn new(
        vcpu: VcpuFd,
        commands: Receiver<Command>,
        immediate_exit: ImmediateExit,
        info: Arc<CaptureInfo>,
        bus: Arc<Bus>,
        events: EventSink,
    ) -> Self {
        Self { vcpu, commands, immediate_exit, info, bus, events, running: false }
    }

    /// Runs until told to exit; gives back the vCPU.
    pub(super) fn run(mut self) -> VcpuFd {
        loop {
            let next = if self.running { self.step() } else { self.wait() };
            if matches!(next, Next::Exit) {
                return self.vcpu;
            }
        }
    }

    fn wait(&mut self) -> Next {
        match self.commands.recv() {
            Ok(command) => self.obey(command),
            Err(_) => Next::Exit,
        }
    }

    fn step(&mut self) -> Next {
        match self.enter_guest() {
            Ran::Handled => Next::Continue,
            Ran::Interrupted => self.obey_all(),
            Ran::Stopped(event) => {
                self.running = false;
                (self.events)(event);
                Next::Continue
            }
        }
    }

    /// Takes the commands that came with a kick. The flag is cleared before the channel is read: a
    /// sender fills the channel before it sets the flag, so no command is left behind.
    fn obey_all(&mut self) -> Next {
        self.immediate_exit.clear();
        while let Ok(command) = self.commands.try_recv() {
            if matches!(self.obey(command), Next::Exit) {
                return Next::Exit;
            }
        }
        Next::Continue
    }

    fn obey(&mut self, command: Command) -> Next {
        // Whoever asked may have gone away; that is no concern of the vCPU.
        match command {
            Command::Resume => self.running = true,
            Command::Pause { done } => {
                self.complete_exits();
                self.running = false;
                let _ = done.send(());
            }
            Command::Capture { reply } => {
                let _ = reply.send(VcpuState::capture(&self.vcpu, &self.info));
            }
            Command::Restore { state, reply } => {
                let _ = reply.send(state.restore(&self.vcpu, &self.info));
            }
            Command::NotifyPaused => {
                // Refused where the guest does not use kvmclock: nothing to tell then.
                let _ = self.vcpu.kvmclock_ctrl();
            }
            Command::Exit => return Next::Exit,
        }
        Next::Continue
    }

    /// The effects of the last I/O exit reach the registers only at the next KVM_RUN (KVM API
    /// section 5), so enter once more without running the guest. An access in several parts can
    /// exit again meanwhile.
    fn complete_exits(&mut self) {
        if !self.running {
            return;
        }
        self.immediate_exit.set();
        loop {
            match self.enter_guest() {
                Ran::Handled => {}
                Ran::Interrupted => break,
                Ran::Stopped(event) => {
                    (self.events)(event);
                    break;
                }
            }
        }
        self.immediate_exit.clear();
    }

    fn enter_guest(&mut self) -> Ran {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => self.bus.pio_write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => self.bus.pio_read(port, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.mmio_write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => self.bus.mmio_read(address, data),
            Ok(VcpuExit::Shutdown) => return Ran::Stopped(VcpuEvent::TripleFault),
            Ok(VcpuExit::Intr) => return Ran::Interrupted,
            Ok(VcpuExit::InternalError) => {
                let text = internal_error(&mut self.vcpu);
                return Ran::Stopped(VcpuEvent::Failed(self.describe(&text)));
            }
            Ok(exit) => {
                let text = format!("{exit:?}");
                return Ran::Stopped(VcpuEvent::Failed(self.describe(&text)));
            }
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => return Ran::Interrupted,
                _ => {
                    let text = format!("KVM_RUN failed: {error}");
                    return Ran::Stopped(VcpuEvent::Failed(self.describe(&text)));
                }
            },
        }
        Ran::Handled
    }

    /// Adds to a failure where the guest was.
    fn describe(&self, what: &str) -> String {
        match (self.vcpu.get_regs(), self.vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "{what} at rip {:#x}, cs {:#x}, cr0 {:#x}, cr3 {:#x}, rsp {:#x}",
                regs.rip, sregs.cs.selector, sregs.cr0, sregs.cr3, regs.rsp
            ),
            _ => what.to_owned(),
        }
    }
}

/// What KVM_EXIT_INTERNAL_ERROR says (KVM API section 5).
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member of
    // the union; it is plain integers.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction that cannot be emulated",
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception while another was handled",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event that could not be delivered",
        _ => "see the kernel's log",
    };
    format!("KVM internal error {suberror} ({what})")
}
