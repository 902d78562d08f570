//! vCPU threads.
//!
//! One thread owns one vCPU. It is paused or it runs:
//!
//! ```text
//!             Resume
//!   Paused ──────────> Running ── guest asks for a reset, dies, KVM fails ──┐
//!     ^                   │                                                 │
//!     │      Pause        │                  the machine is told of it      │
//!     └───────────────────┴─────────────────────────────────────────────────┘
//! ```
//!
//! Commands come over a channel and are answered over another; state is captured and restored only
//! while paused, by the thread itself, so no vCPU ioctl ever races with KVM_RUN.

mod kick;
mod runner;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::Killable;

use crate::bus::Bus;
use crate::kvm::vcpu_state::{CaptureInfo, VcpuState};
use crate::kvm::{self};
use kick::{ImmediateExit, kick_signal};
use runner::Runner;

/// What a vCPU tells the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest lost control of itself (a fault while handling a double fault).
    TripleFault,
    /// KVM or the host failed; the text says how. The vCPU has paused.
    Failed(String),
}

/// Where vCPUs leave their events.
pub type EventSink = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

/// What can go wrong with a vCPU thread.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The thread could not be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Spawn {
        /// Which vCPU.
        index: u8,
        /// What the host said.
        source: io::Error,
    },
    /// The thread is gone, which only a bug can cause.
    #[error("the thread of vCPU {0} has ended")]
    Gone(u8),
    /// KVM refused.
    #[error("vCPU {index}: {source}")]
    Kvm {
        /// Which vCPU.
        index: u8,
        /// Which call.
        source: kvm::Error,
    },
}

enum Command {
    Resume,
    Pause { done: Sender<()> },
    Capture { reply: Sender<kvm::Result<VcpuState>> },
    Restore { state: Box<VcpuState>, reply: Sender<kvm::Result<()>> },
    NotifyPaused,
    Exit,
}

/// A vCPU's thread, seen from the machine.
pub struct VcpuHandle {
    index: u8,
    thread_id: libc::pid_t,
    commands: Sender<Command>,
    immediate_exit: ImmediateExit,
    // Gives back the VcpuFd, so that `immediate_exit` stays valid until the thread is joined.
    thread: Option<JoinHandle<VcpuFd>>,
}

impl VcpuHandle {
    /// Starts the thread, paused.
    pub fn spawn(
        index: u8,
        mut vcpu: VcpuFd,
        info: Arc<CaptureInfo>,
        bus: Arc<Bus>,
        events: EventSink,
    ) -> Result<Self, Error> {
        kick_signal();
        let (commands, receiver) = channel();
        let (tell_id, thread_id) = channel();
        let immediate_exit = ImmediateExit::of(&mut vcpu);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                // SAFETY: gettid has no preconditions.
                let _ = tell_id.send(unsafe { libc::gettid() });
                Runner::new(vcpu, receiver, immediate_exit, info, bus, events).run()
            })
            .map_err(|source| Error::Spawn { index, source })?;
        let thread_id = thread_id.recv().map_err(|_| Error::Gone(index))?;
        Ok(Self { index, thread_id, commands, immediate_exit, thread: Some(thread) })
    }

    /// The host's id of the thread, as query-cpus-fast tells it.
    pub fn thread_id(&self) -> libc::pid_t {
        self.thread_id
    }

    /// Lets the vCPU run.
    pub fn resume(&self) -> Result<(), Error> {
        self.send(Command::Resume)
    }

    /// Asks the vCPU to stop; the receiver gets a message when it has, with every exit completed.
    pub fn pause(&self) -> Result<PendingPause, Error> {
        let (done, receiver) = channel();
        self.send(Command::Pause { done })?;
        self.kick();
        Ok(PendingPause { index: self.index, done: receiver })
    }

    /// Tells KVM's clock that the paused guest was paused, so that the guest's watchdogs forgive it.
    pub fn notify_paused(&self) -> Result<(), Error> {
        self.send(Command::NotifyPaused)
    }

    /// Reads the state of the paused vCPU.
    pub fn capture(&self) -> Result<VcpuState, Error> {
        let (reply, receiver) = channel();
        self.send(Command::Capture { reply })?;
        answer(self.index, &receiver)
    }

    /// Begins to replace the state of the paused vCPU.
    pub fn restore(&self, state: VcpuState) -> Result<PendingRestore, Error> {
        let (reply, done) = channel();
        self.send(Command::Restore { state: Box::new(state), reply })?;
        Ok(PendingRestore { index: self.index, done })
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).map_err(|_| Error::Gone(self.index))
    }

    fn kick(&self) {
        self.immediate_exit.set();
        if let Some(thread) = &self.thread
            && let Err(error) = thread.kill(kick_signal())
        {
            tracing::error!("cannot signal vCPU {}: {error}", self.index);
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        // An error says that the thread has ended already.
        let _ = self.commands.send(Command::Exit);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer<T>(index: u8, receiver: &Receiver<kvm::Result<T>>) -> Result<T, Error> {
    receiver.recv().map_err(|_| Error::Gone(index))?.map_err(|source| Error::Kvm { index, source })
}

/// A state that is being put in place.
#[must_use]
pub struct PendingRestore {
    index: u8,
    done: Receiver<kvm::Result<()>>,
}

impl PendingRestore {
    /// Waits until it is.
    pub fn wait(self) -> Result<(), Error> {
        answer(self.index, &self.done)
    }
}

/// A pause that was asked for.
#[must_use]
pub struct PendingPause {
    index: u8,
    done: Receiver<()>,
}

impl PendingPause {
    /// Waits until the vCPU has stopped, but no longer than `patience`; false if it has not.
    pub fn wait_for(&self, patience: Duration) -> Result<bool, Error> {
        match self.done.recv_timeout(patience) {
            Ok(()) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Gone(self.index)),
        }
    }
}
