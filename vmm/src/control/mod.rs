//! The main thread: it owns the machine and does one thing at a time.
//!
//! Everything that wants something of the machine comes here as an event: QMP commands, vCPUs that
//! cannot go on, the guest's wish for a reset, console input, signals, snapshot jobs. Handlers do
//! not block but for the time a pause takes; what takes longer runs on a job's thread (see
//! [`work`]), which comes back with messages.

mod block_info;
mod block_stats;
mod commands;
pub mod daemon;
mod disk_errors;
mod hot;
pub mod mailbox;
pub mod migration;
pub(crate) mod monitor;
mod pauses;
mod rewind;
mod run_state;
mod snapshot_jobs;
mod throttle;
pub mod work;

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use qmp::schema::{Event, RunState, ShutdownCause};
use tracing::error;

use crate::blocks::Blocks;
use crate::blocks::worker::Worker;
use crate::console::{Console, Input};
use crate::early::Early;
use crate::machine::{self, Machine};
use crate::vcpu::VcpuEvent;
use mailbox::{Inbox, Mailbox, Message};
use pauses::Pauses;
use run_state::Hold;
use snapshot_jobs::SnapshotJobs;

/// Console input taken at a time, in bytes.
const INPUT_CHUNK: usize = 256;

/// What the main thread cannot do without.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// epoll failed.
    #[error("the event loop failed: {0}")]
    EventLoop(String),
    /// Signals cannot be received.
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
    /// The host has no thread for block commands.
    #[error("cannot start a thread: {0}")]
    Worker(std::io::Error),
    /// An image could not be written at the end.
    #[error(transparent)]
    Image(#[from] block::Error),
    /// The terminal on the serial port refuses.
    #[error("cannot use the terminal: {0}")]
    Terminal(std::io::Error),
    /// The machine that was to come did not.
    #[error("load of migration failed: {0}")]
    Incoming(String),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] machine::Error),
}

impl From<event_manager::Error> for Error {
    fn from(error: event_manager::Error) -> Self {
        Self::EventLoop(error.to_string())
    }
}

/// What the main thread starts with.
pub struct Parts {
    /// A machine that is paused, booted or revived.
    pub machine: Machine,
    /// The block nodes and exports.
    pub blocks: Arc<Blocks>,
    /// The host's end of the serial port.
    pub console: Console,
    /// Where other threads leave messages.
    pub inbox: Inbox,
    /// The other end of it.
    pub mailbox: Mailbox,
    /// Signals that have come, or will.
    pub early: Early,
    /// The QMP server.
    pub server: qmp::Server,
    /// Commands of QMP clients.
    pub requests: qmp::Requests,
    /// A reset of the guest ends the machine.
    pub no_reboot: bool,
    /// The machine is to be what comes from elsewhere.
    pub incoming: Option<migration::Incoming>,
    /// The guest is to run at once, or when it is there.
    pub start: bool,
}

/// The main thread's state.
pub struct Controller {
    machine: Machine,
    blocks: Arc<Blocks>,
    worker: Worker,
    console: Console,
    inbox: Inbox,
    mailbox: Mailbox,
    server: qmp::Server,
    requests: qmp::Requests,
    events: qmp::Events,
    /// Readable after a signal that ends the machine.
    signals: UnixStream,
    jobs: SnapshotJobs,
    migration: migration::Migration,
    pauses: Pauses,
    /// The checkpoint saved or loaded last.
    rewind: Option<Box<rewind::Rewind>>,
    /// How often it was gone back to by [`rewind`].
    rewinds: u64,
    /// What that has put back.
    rewound_bytes: u64,
    state: RunState,
    /// Set while a job keeps the guest stopped.
    hold: Option<Hold>,
    /// A save still reads RAM: it may not be replaced.
    guarded: bool,
    no_reboot: bool,
    /// The guest is to run at once.
    start: bool,
    /// The machine is to end.
    ending: bool,
    /// Why it ends, if that is an error.
    failure: Option<Error>,
}

impl Controller {
    /// Takes over the machine, which is not started yet.
    ///
    /// # Errors
    /// Signals cannot be received, or the terminal refuses to be raw.
    pub fn new(mut parts: Parts) -> Result<Self, Error> {
        let signals = parts.early.end().map_err(Error::Signals)?;
        parts.console.take_terminal().map_err(Error::Terminal)?;
        let events = parts.server.events();
        let jobs = SnapshotJobs::new(parts.blocks.jobs().clone());
        Ok(Self {
            machine: parts.machine,
            worker: Worker::start(Arc::clone(&parts.blocks)).map_err(Error::Worker)?,
            blocks: parts.blocks,
            console: parts.console,
            inbox: parts.inbox,
            mailbox: parts.mailbox,
            jobs,
            pauses: Pauses::default(),
            rewind: None,
            rewinds: 0,
            rewound_bytes: 0,
            server: parts.server,
            requests: parts.requests,
            events,
            signals,
            state: RunState::PreLaunch,
            hold: None,
            guarded: false,
            no_reboot: parts.no_reboot,
            start: parts.start && parts.incoming.is_none(),
            migration: migration::Migration::new(parts.incoming, parts.start),
            ending: false,
            failure: None,
        })
    }

    /// Runs the machine until it ends, then stops everything with the disks flushed.
    ///
    /// # Errors
    /// The event loop fails, the guest does not come from where it should, or a disk cannot be flushed at
    /// the end.
    pub fn run(mut self) -> Result<(), Error> {
        self.begin_incoming()?;
        if self.start {
            self.machine.resume()?;
            self.state = RunState::Running;
        }
        let mut manager = EventManager::new()?;
        let id = manager.add_subscriber(self);
        while !manager.subscriber_mut(id)?.ending {
            manager.run()?;
        }
        manager.remove_subscriber(id)?.finish()
    }

    fn finish(mut self) -> Result<(), Error> {
        self.worker.finish();
        self.abandon_jobs();
        // Clients of exports first, whose BLOCK_EXPORT_DELETED monitors still hear. The guest's disks
        // are flushed, then all images are closed; the console goes last: it puts the terminal back.
        let exports = self.blocks.exports().stop();
        tracing::debug!("the NBD server at the end: {exports:?}");
        self.server.shutdown();
        let machine = self.machine.shutdown();
        let images = self.blocks.close();
        self.console.finish();
        machine?;
        images?;
        match self.failure {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Work(message) => self.work_message(message),
            Message::Disk { slot, failure } => self.disk_failed(slot, &failure),
            Message::DiskSize => self.machine.devices().refresh_config(),
            Message::Missing { id, notice } => self.missing_notice(id, notice),
            Message::GuestPowerOff => self.shutdown(true, ShutdownCause::GuestShutdown),
            Message::GuestReset | Message::Vcpu(VcpuEvent::TripleFault) => self.guest_reset(),
            Message::Vcpu(VcpuEvent::Failed(text)) => self.fail(&text),
        }
    }

    fn read_console(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let room = self.machine.devices().console_room().min(INPUT_CHUNK);
        if room == 0 {
            // Level-triggered epoll would spin: watch again when the guest has read.
            unwatch(ops, fd);
            return;
        }
        let mut buf = [0; INPUT_CHUNK];
        match self.console.read(fd, &mut buf[..room]) {
            Input::Bytes(count) => self.machine.devices().console_input(&buf[..count]),
            Input::Nothing => {}
            Input::End => {
                unwatch(ops, fd);
                if let Some(output) = self.console.ended_output_fd() {
                    unwatch(ops, output);
                }
                self.console.close_ended();
                // A console that has another descriptor to watch now, or none.
                self.watch_console(ops, Some(fd));
            }
        }
    }

    /// The guest's output has a reader that takes some now.
    fn write_console(&self, fd: RawFd, ops: &mut EventOps<'_>) {
        if !self.console.send_kept() {
            unwatch(ops, fd);
        }
    }

    fn watch_console(&self, ops: &mut EventOps<'_>, ended: Option<RawFd>) {
        let is_socket = self.console.socket_path().is_some();
        for fd in self.console.watched() {
            if is_socket || ended != Some(fd) {
                watch(ops, fd);
            }
        }
    }
}

impl MutEventSubscriber for Controller {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.inbox.as_raw_fd());
        watch(ops, self.requests.event().as_raw_fd());
        watch(ops, self.signals.as_raw_fd());
        watch(ops, self.machine.devices().console_wants_input().as_raw_fd());
        if let Some(waits) = self.console.output_waits() {
            watch(ops, waits.as_raw_fd());
        }
        self.watch_console(ops, None);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.inbox.as_raw_fd() {
            self.inbox.acknowledge();
            while let Some(message) = self.inbox.next() {
                self.handle(message);
                self.rewind_now();
            }
        } else if fd == self.requests.event().as_raw_fd() {
            for request in self.requests.take() {
                self.command(request);
                self.rewind_now();
            }
        } else if fd == self.signals.as_raw_fd() {
            self.shutdown(false, ShutdownCause::HostSignal);
        } else if fd == self.machine.devices().console_wants_input().as_raw_fd() {
            self.machine.devices().acknowledge_console_wants_input();
            self.watch_console(ops, None);
        } else if let Some(waits) = self.console.output_waits().filter(|w| w.as_raw_fd() == fd) {
            // Empty if it was woken for nothing.
            let _ = waits.read();
            if let Some(output) = self.console.output_fd() {
                watch_for(ops, output, EventSet::OUT);
            }
        } else if self.console.output_fd() == Some(fd) {
            self.write_console(fd, ops);
        } else {
            self.read_console(fd, ops);
        }
    }
}

fn watch(ops: &mut EventOps<'_>, fd: RawFd) {
    watch_for(ops, fd, EventSet::IN);
}

fn watch_for(ops: &mut EventOps<'_>, fd: RawFd, what: EventSet) {
    match ops.add(Events::new_raw(fd, what)) {
        // It is watched already.
        Ok(()) | Err(event_manager::Error::FdAlreadyRegistered) => {}
        // A regular file as standard input: it has no readiness, and a guest no use for it.
        Err(error) => tracing::debug!("descriptor {fd} cannot be watched: {error}"),
    }
}

fn unwatch(ops: &mut EventOps<'_>, fd: RawFd) {
    if let Err(error) = ops.remove(Events::empty_raw(fd)) {
        tracing::debug!("descriptor {fd} was not watched: {error}");
    }
}

impl Controller {
    fn emit(&self, event: &Event) {
        self.events.emit(event);
    }

    fn fail(&mut self, text: &str) {
        error!("the guest cannot go on: {text}");
        self.stop_in(RunState::InternalError);
    }
}
