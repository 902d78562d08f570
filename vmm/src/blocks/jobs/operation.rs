//! A block operation as a job: its thread, and what the list knows of it.
//!
//! ```text
//!   list (any thread)                     job's thread
//!   created, running  ── spawn ─────────> run
//!   pause, cancel, ... ── Control ──────>  │
//!                      <── Notice ────────  │  paused, ready, error
//!                      <── finish ──────── end of run
//!   waiting, pending
//!   settle ── Settle ───────────────────> commit or abort; all that it holds is let go
//!                      <── settled ───────
//!   concluded
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use block::Error;
use block::jobs::{Action, Control, MirrorHandle, Notice, Operation};
use qmp::jobs::{GroupId, IoFailure, NewJob, Outcome, Settle, StateError, Step, Work, WorkReport};
use qmp::schema::{BlockErrorAction, IoOperationType, MirrorCopyMode};

use super::JobList;

/// A mirror as block-job-change knows it.
pub struct RunningMirror {
    handle: MirrorHandle,
    /// Its copy mode is write-blocking.
    blocking: AtomicBool,
}

impl RunningMirror {
    /// A mirror that begins in this mode.
    pub fn new(handle: MirrorHandle, mode: MirrorCopyMode) -> Self {
        Self { handle, blocking: AtomicBool::new(mode == MirrorCopyMode::WriteBlocking) }
    }

    /// Another copy mode from now on.
    fn change(&self, mode: MirrorCopyMode) -> Result<(), qmp::Error> {
        let blocking = self.blocking.load(Ordering::Acquire);
        match mode {
            MirrorCopyMode::WriteBlocking => {
                self.handle.set_write_blocking();
                self.blocking.store(true, Ordering::Release);
                Ok(())
            }
            MirrorCopyMode::Background if !blocking => Ok(()),
            MirrorCopyMode::Background => {
                Err(qmp::Error::generic("Change to copy mode 'background' is not implemented"))
            }
        }
    }

    /// Whether the target has all of the source, and each write goes to both.
    fn is_synced(&self) -> bool {
        self.handle.actively_synced()
    }
}

/// What kind of work an operation is.
#[derive(Default)]
pub struct Kind {
    /// It becomes ready, and waits to be told to complete.
    pub completes: bool,
    /// It is a mirror.
    pub mirror: Option<RunningMirror>,
}

/// What the list knows of an operation.
struct Handle {
    control: Arc<Control>,
    kind: Kind,
    /// Its thread was started.
    started: Arc<AtomicBool>,
    orders: Sender<Settle>,
}

impl Work for Handle {
    fn progress(&self) -> (u64, u64) {
        self.control.progress()
    }

    fn report(&self) -> WorkReport {
        let synced = self.kind.mirror.as_ref().map(RunningMirror::is_synced);
        WorkReport { synced, ..WorkReport::default() }
    }

    fn cancel(&mut self, force: bool) -> bool {
        self.control.cancel(force);
        true
    }

    fn pause(&mut self) -> bool {
        self.control.pause();
        true
    }

    fn resume(&mut self) {
        self.control.resume();
    }

    fn can_complete(&self) -> bool {
        self.kind.completes
    }

    fn complete(&mut self) {
        self.control.complete();
    }

    fn set_speed(&mut self, speed: u64) {
        self.control.set_speed(speed);
    }

    fn change(&mut self, mode: MirrorCopyMode) -> Result<(), qmp::Error> {
        match &self.kind.mirror {
            Some(mirror) => mirror.change(mode),
            None => Err(qmp::Error::generic("Job type does not support change")),
        }
    }

    fn settle(&mut self, how: Settle) -> Step {
        // A job that was never started is undone by whoever made it.
        if self.started.load(Ordering::Acquire) && self.orders.send(how).is_ok() {
            return Step::Later;
        }
        Step::Done
    }
}

/// A job that is created and not yet started. Dropped, it goes again, and so does the operation.
pub struct NewOperation {
    list: JobList,
    id: String,
    control: Arc<Control>,
    /// None once it was started.
    parts: Option<(Undo, Receiver<Settle>)>,
    started: Arc<AtomicBool>,
}

/// An operation that is undone when it is dropped, unless it has ended.
struct Undo {
    operation: Box<dyn Operation>,
    ended: bool,
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.ended {
            self.operation.abort();
        }
    }
}

impl NewOperation {
    /// Adds the job of an operation to the list.
    ///
    /// # Errors
    /// The id is malformed or taken; the operation is undone.
    pub fn create(
        list: &JobList,
        new: NewJob<'_>,
        kind: Kind,
        operation: Box<dyn Operation>,
    ) -> Result<Self, qmp::Error> {
        let operation = Undo { operation, ended: false };
        let control = Arc::new(Control::new(watch(list.clone(), new.id.to_owned())));
        control.set_speed(new.speed.unsigned_abs());
        let (orders, receiver) = channel();
        let started = Arc::new(AtomicBool::new(false));
        let (control_, started_) = (Arc::clone(&control), Arc::clone(&started));
        let handle = Handle { control: control_, kind, started: started_, orders };
        let id = new.id.to_owned();
        list.lock().create(new, Box::new(handle))?;
        let parts = Some((operation, receiver));
        Ok(Self { list: list.clone(), id, control, parts, started })
    }

    /// Starts the job.
    ///
    /// # Errors
    /// It was cancelled meanwhile; the operation is undone.
    pub fn start(mut self) -> Result<(), StateError> {
        let Some((operation, orders)) = self.parts.take() else { return Ok(()) };
        let thread = Thread {
            list: self.list.clone(),
            id: self.id.clone(),
            control: Arc::clone(&self.control),
            operation,
            orders,
        };
        // With the lock held: the thread can report only after it.
        let mut jobs = self.list.lock();
        if let Err(error) = jobs.start(&self.id) {
            drop(jobs);
            drop(thread);
            return Err(error);
        }
        let builder = std::thread::Builder::new().name("block-job".to_owned());
        // The thread gets its job when it is there, so that it can be undone without the lock here.
        let (hand, job) = channel::<Thread>();
        let spawned = builder.spawn(move || {
            if let Ok(thread) = job.recv() {
                thread.work();
            }
        });
        match spawned {
            Ok(_) => {
                self.started.store(true, Ordering::Release);
                // It waits for this and cannot be gone.
                let _ = hand.send(thread);
                Ok(())
            }
            Err(error) => {
                drop(jobs);
                drop(thread);
                let text = format!("Cannot start the job's thread: {error}");
                self.list.lock().finish(&self.id, Outcome::Failure(text))
            }
        }
    }
}

impl Drop for NewOperation {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            drop(parts);
            // A client may have cancelled it meanwhile.
            if let Err(error) = self.list.lock().abandon(&self.id) {
                tracing::debug!("{error}");
            }
        }
    }
}

/// Tells the list what an operation's control notices.
fn watch(list: JobList, id: String) -> impl Fn(Notice) + Send + Sync + 'static {
    move |notice| {
        list.report(|jobs| match notice {
            Notice::Paused => jobs.paused(&id),
            Notice::Ready => jobs.ready(&id),
            Notice::Error { read, action, nospace } => {
                let operation = if read { IoOperationType::Read } else { IoOperationType::Write };
                let action = match action {
                    Action::Report => BlockErrorAction::Report,
                    Action::Ignore => BlockErrorAction::Ignore,
                    Action::Stop => BlockErrorAction::Stop,
                };
                jobs.io_failed(&id, IoFailure { operation, action, nospace })
            }
        });
    }
}

/// What a job's thread has.
struct Thread {
    list: JobList,
    id: String,
    control: Arc<Control>,
    operation: Undo,
    orders: Receiver<Settle>,
}

impl Thread {
    fn work(mut self) {
        let result = guarded(|| self.operation.operation.run(&self.control));
        let outcome = match result {
            Ok(()) => Outcome::Success,
            Err(End::Cancelled) => Outcome::Cancelled,
            Err(End::Failed(text)) => Outcome::Failure(text),
        };
        let Self { list, id, mut operation, orders, .. } = self;
        list.report(|jobs| jobs.finish(&id, outcome));
        // No order: the list is gone, and with it all who could want the outcome.
        let order = orders.recv().unwrap_or(Settle::Abort);
        operation.ended = true;
        let result = settle(&mut *operation.operation, order);
        // What it held is free before anybody hears of the end.
        drop(operation);
        list.report(|jobs| jobs.settled(&id, result));
    }
}

fn settle(operation: &mut dyn Operation, how: Settle) -> Result<(), String> {
    let result = match how {
        Settle::Commit => guarded(|| operation.commit()),
        Settle::Abort => Err(End::Cancelled),
    };
    let Err(end) = result else { return Ok(()) };
    let undone = guarded(|| {
        operation.abort();
        Ok(())
    });
    match (how, end, undone) {
        (Settle::Abort, _, Ok(())) => Ok(()),
        (_, End::Failed(text), _) | (Settle::Abort, _, Err(End::Failed(text))) => Err(text),
        (_, End::Cancelled, _) => Err("Operation canceled".to_owned()),
    }
}

/// Why an operation did not succeed.
enum End {
    Cancelled,
    Failed(String),
}

/// A panic would leave a job that never ends.
fn guarded(work: impl FnOnce() -> block::Result<()>) -> Result<(), End> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Error::Cancelled)) => Err(End::Cancelled),
        Ok(Err(error)) => Err(End::Failed(error.to_string())),
        Err(_) => Err(End::Failed("the job's thread has panicked".to_owned())),
    }
}

/// What a job is to be, from the arguments that all block jobs have.
pub struct JobOptions {
    /// Its id; none is refused as an empty one.
    pub id: Option<String>,
    /// Bytes a second; 0 is no limit.
    pub speed: Option<i64>,
    /// See [`qmp::jobs::AutoFlags`].
    pub auto_finalize: Option<bool>,
    /// The same.
    pub auto_dismiss: Option<bool>,
    /// What it ends with.
    pub group: Option<GroupId>,
    /// The node that it is said to put above its source.
    pub filter: Filter,
}

/// The filter of a job.
pub struct Filter {
    /// Its node's name, if it was given one.
    pub name: Option<String>,
    /// How QEMU's errors about it begin.
    pub before_error: &'static str,
}

impl Filter {
    /// One that is opened.
    pub fn new(name: Option<String>) -> Self {
        Self { name, before_error: "" }
    }

    /// One that is put above a node as it is made.
    pub fn inserted(name: Option<String>) -> Self {
        Self { name, before_error: "Could not create node: " }
    }
}
