//! The work of snapshot jobs, each on a thread of its own.
//!
//! Only the main thread touches the machine. A job's thread checks what it can while the guest
//! runs, asks the main thread to stop the guest when it must, does the long reading or writing,
//! and tells the main thread that it is over, which lets the guest go on:
//!
//! ```text
//!   job thread                         main thread
//!   checks
//!   (save) Track ────────────────────> has KVM log what the guest writes
//!     <───────────────────────────────
//!   (live save) Collect ─────────────> takes what was written; again and again
//!     <───────────────────────────────
//!   writes RAM
//!   Freeze ──────────────────────────> pauses the machine, captures its state
//!     <───────────────────────────────
//!   (live save) Thaw ────────────────> lets the guest run on
//!   writes / reads RAM and disks       answers QMP
//!   (save) Saved ────────────────────> has a new base
//!   (load) Restore ──────────────────> puts vCPU and device state in place
//!     <───────────────────────────────
//!   (load) Run ──────────────────────> lets the guest run
//!   makes the disks durable, gives back
//!   Done ────────────────────────────> lets the guest run on, concludes the job
//! ```
//!
//! A job that ends before `Freeze` has not touched the guest.

pub mod incoming;
mod load;
pub mod migrate;
mod save;
mod transaction;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::SystemTime;

use block::qcow2::Compression;
use block::{Graph, Node, Progress};
use devices::{GuestMemory, Presence};
use qmp::schema::{LoadClock, LoadMode, RunState, TransactionArguments};
use snapshot::{About, Base, MachineConfig, Orders, PageSet, SaveReport};
use tracing::info;

pub use self::load::{Ram, Revival, lazy_host};
use super::mailbox::{Mailbox, Message};
use super::rewind::Rewind;
use crate::blocks::Blocks;
use crate::checkpoints::CurrentLineage;
use crate::machine::missing::Missing;
use crate::machine::recorded;
use crate::machine::state::{MachineState, Shape};
use crate::memory::shadows::Shadows;

/// Threads that move RAM. More do not help one disk.
pub(crate) const IO_THREADS: usize = 4;

/// What a job is to do.
#[derive(Debug, Clone)]
pub enum Task {
    /// snapshot-save, with what is said of the checkpoint
    Save(Target, SaveOptions, About),
    /// A transaction with the machine's state in it, and what is said of the checkpoint.
    Transaction(TransactionArguments, About),
    /// snapshot-load
    Load(Target, LoadOptions),
    /// snapshot-delete
    Delete {
        /// The checkpoint.
        tag: String,
        /// Names of the nodes.
        devices: Vec<String>,
    },
}

/// How a save is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions {
    /// Whether the guest runs.
    pub mode: SaveMode,
    /// How VM state is compressed, if it is to be.
    pub compress: Option<Compression>,
}

/// Whether the guest runs while it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveMode {
    /// It does, but for a moment.
    Live,
    /// It stands still.
    Stop,
}

/// How a load is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// When RAM is read.
    pub mode: LoadMode,
    /// What the guest's clocks do.
    pub clock: LoadClock,
}

impl LoadOptions {
    /// Where nothing is said.
    pub const USUAL: Self = Self { mode: LoadMode::Lazy, clock: LoadClock::Frozen };
}

/// A checkpoint and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its tag.
    pub tag: String,
    /// Name of the node with the VM state.
    pub vmstate: String,
    /// Names of all nodes.
    pub devices: Vec<String>,
}

/// How a job ended.
pub type Outcome = Result<(), WorkError>;

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkError {
    /// It was cancelled.
    Cancelled,
    /// Something failed; the text is for the user.
    Failed(String),
}

impl<E: std::error::Error> From<E> for WorkError {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A stopped machine.
pub struct Frozen {
    /// Its state without RAM and disks.
    pub state: MachineState,
    /// To save it: pages of RAM that were written since the last [`WorkMessage::Collect`].
    pub pages: PageSet,
    /// The host's time of day when it was stopped, or had been before.
    pub date: SystemTime,
}

/// What a save begins with.
pub struct Tracked {
    /// What RAM equals but for the pages that are collected.
    pub base: Option<Base>,
    /// Whether only what was written is collected, and not all of RAM each time.
    pub logged: bool,
    /// Bytes of the machine's state at most.
    pub state_bytes: u64,
}

/// Why the guest is to be stopped.
pub enum Freeze {
    /// To save it.
    Save,
    /// To send the last of it.
    Migrate,
    /// To replace it by this state, which is checked before the guest is stopped.
    Load(Box<MachineState>),
}

/// A checkpoint whose RAM and disks are in place.
pub struct Loaded {
    /// What was asked for and loaded.
    pub rewind: Rewind,
    /// RAM that is still to be read.
    pub missing: Option<Arc<Missing>>,
    /// What the guest's clocks do.
    pub clock: LoadClock,
}

/// What a job's thread asks of the main thread.
pub enum WorkMessage {
    /// Log what the guest writes.
    Track {
        /// Gets what is known of RAM.
        reply: Sender<Result<Tracked, WorkError>>,
    },
    /// Tell which pages of RAM were written, since the base or the last time.
    Collect {
        /// Gets them.
        reply: Sender<Result<PageSet, WorkError>>,
    },
    /// Let the guest that was stopped to be saved run on.
    Thaw {
        /// What is still to be saved is in RAM, guarded: RAM may not be replaced.
        guarded: bool,
    },
    /// That is over.
    Unguarded,
    /// The moment of a transaction has passed: its client can be answered.
    Passed,
    /// The checkpoint is there.
    Saved {
        /// It, as a base.
        base: Base,
        /// What was done.
        report: SaveReport,
        /// What is needed to go back to it.
        rewind: Option<Box<Rewind>>,
    },
    /// Stop the guest; a migration goes on with it elsewhere.
    Freeze {
        /// Why.
        purpose: Freeze,
        /// The machine's disks as the job knows them.
        disks: Vec<String>,
        /// Gets the state the guest was stopped in.
        reply: Sender<Result<Frozen, WorkError>>,
    },
    /// Put this state on the stopped machine.
    Restore {
        /// The state, and what is to be remembered of it.
        loaded: Box<Loaded>,
        /// Tells whether it worked.
        reply: Sender<Result<(), WorkError>>,
    },
    /// The machine is that of the checkpoint: the guest may run.
    Run,
    /// A migration is further.
    Migration(migrate::Step),
    /// Tell what the guest does where nobody holds it.
    Doing {
        /// Gets it.
        reply: Sender<Result<RunState, WorkError>>,
    },
    /// Drop what keeps images open: others are about to take their places.
    LetGo {
        /// Told when it is done.
        reply: Sender<Result<(), WorkError>>,
    },
    /// The other end of a migration is about to have all of it.
    Final {
        /// Told whether it may: not where it was cancelled.
        reply: Sender<Result<(), WorkError>>,
    },
    /// The machine that came is to go on here.
    Arrived {
        /// Its state, and what the source was doing.
        arrived: Box<incoming::Arrived>,
        /// Tells whether it worked.
        reply: Sender<Result<(), WorkError>>,
    },
    /// The job is over.
    Done(Outcome),
}

/// What a job's thread works with.
pub struct WorkContext {
    /// The block side.
    pub blocks: Arc<Blocks>,
    /// The disks.
    pub graph: Arc<Graph>,
    /// The guest's RAM.
    pub memory: GuestMemory,
    /// What KVM derives from it.
    pub shadows: Arc<Shadows>,
    /// What the machine is.
    pub config: MachineConfig,
    /// What parts it has.
    pub shape: Shape,
    /// Tells the devices that pages may be missing.
    pub presence: Presence,
    /// What guests touched first after earlier loads.
    pub orders: Arc<Orders>,
    /// What an earlier load has still to read.
    pub missing: Option<Arc<Missing>>,
    /// Where its guest comes from.
    pub lineage: Arc<CurrentLineage>,
    /// Counts bytes, and tells of a cancel.
    pub progress: Arc<Progress>,
    /// Set when guest memory is overwritten: from then on a failure leaves nothing to run.
    pub memory_lost: Arc<AtomicBool>,
    /// The way to the main thread.
    pub mailbox: Mailbox,
}

/// Starts the thread of a job. Its last message is [`WorkMessage::Done`].
///
/// # Errors
/// The host has no thread to give.
pub fn start(task: Task, context: WorkContext) -> std::io::Result<JoinHandle<()>> {
    start_with("snapshot-job", context, move |context| run(task, context))
}

/// Starts a thread with this name and work. Its last message is [`WorkMessage::Done`].
///
/// # Errors
/// The host has no thread to give.
pub fn start_with(
    name: &str,
    context: WorkContext,
    work: impl FnOnce(&WorkContext) -> Outcome + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let outcome = work(&context);
        context.mailbox.send(Message::Work(WorkMessage::Done(outcome)));
    })
}

fn run(task: Task, context: &WorkContext) -> Outcome {
    match task {
        Task::Save(target, how, about) => {
            save::save(&target, how, about, context, &mut save::Alone)
        }
        Task::Transaction(arguments, about) => transaction::run(&arguments, about, context),
        Task::Load(target, how) => load::load(&target, how, context),
        Task::Delete { tag, devices } => {
            let nodes = context.resolve(&devices)?;
            // RAM that is still in there is read before it goes.
            if context.missing.as_ref().is_some_and(|missing| devices.contains(&missing.node)) {
                context.read_missing()?;
            }
            let report =
                snapshot::delete_unless(&nodes, &tag, &context.progress).map_err(|error| {
                    if error.is_cancelled() { WorkError::Cancelled } else { error.into() }
                })?;
            info!("deleted '{tag}' from {:?}", report.deleted);
            Ok(())
        }
    }
}

impl WorkContext {
    fn resolve(&self, names: &[String]) -> Result<Vec<Arc<Node>>, WorkError> {
        Ok(snapshot::resolve(names, |name| self.graph.get(name))?)
    }

    fn track(&self) -> Result<Tracked, WorkError> {
        self.ask(|reply| WorkMessage::Track { reply })
    }

    fn collect(&self) -> Result<PageSet, WorkError> {
        self.ask(|reply| WorkMessage::Collect { reply })
    }

    fn send(&self, message: WorkMessage) {
        self.mailbox.send(Message::Work(message));
    }

    fn freeze(&self, purpose: Freeze) -> Result<Frozen, WorkError> {
        let disks = recorded::disks_of(&self.config);
        self.ask(|reply| WorkMessage::Freeze { purpose, disks, reply })
    }

    /// Reads what an earlier load has left in its image, guest running.
    fn read_missing(&self) -> Outcome {
        let Some(missing) = &self.missing else { return Ok(()) };
        match missing.ram.complete(&self.progress) {
            Ok(()) => Ok(()),
            // A reset has put other contents in its place, of which nothing is missing.
            Err(_) if missing.ram.is_abandoned() => Ok(()),
            Err(block::Error::Cancelled) => Err(WorkError::Cancelled),
            Err(error) => Err(WorkError::Failed(format!(
                "RAM of snapshot '{}' could not be read from '{}': {error}",
                missing.tag, missing.node
            ))),
        }
    }

    fn ask<T>(
        &self,
        message: impl FnOnce(Sender<Result<T, WorkError>>) -> WorkMessage,
    ) -> Result<T, WorkError> {
        let (reply, answer) = channel();
        self.mailbox.send(Message::Work(message(reply)));
        // No answer: the main thread has ended, and with it the machine.
        answer.recv().unwrap_or(Err(WorkError::Cancelled))
    }
}
