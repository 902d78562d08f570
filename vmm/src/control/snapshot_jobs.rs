//! Snapshot jobs: one works at a time, the next waits in state created.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use block::Progress;
use qmp::jobs::{AutoFlags, NewJob, Outcome, StateError, Work, WorkReport};
use qmp::schema::{JobType, RunState, TransactionAction, TransactionArguments};
use snapshot::{About, Base, PageSet};
use tracing::error;

use super::Controller;
use super::mailbox::Message;
use super::pauses::nanoseconds;
use super::work::{
    self, Freeze, Frozen, Loaded, Task, Tracked, WorkContext, WorkError, WorkMessage,
};
use crate::blocks::jobs::JobList;
use crate::machine::missing::Missing;
use crate::machine::recorded;
use crate::machine::state::MachineState;
use crate::memory::dirty_log::Protect;

/// The id of a job that no client knows of.
const HIDDEN: &str = "#transaction";

/// The jobs, and what they are to do.
pub(super) struct SnapshotJobs {
    list: JobList,
    waiting: VecDeque<Waiting>,
    pub(super) current: Option<Current>,
    /// The load that is to be done by [`Controller::rewind_now`], when the client was answered.
    pub(super) rewinding: Option<Task>,
}

struct Waiting {
    id: String,
    task: Task,
    handle: Handle,
}

pub(super) struct Current {
    pub(super) id: String,
    pub(super) handle: Handle,
    /// None for what the main thread does itself.
    pub(super) thread: Option<JoinHandle<()>>,
}

/// What the job list and the main thread know of a job's work.
#[derive(Clone)]
pub(super) struct Handle {
    pub(super) progress: Arc<Progress>,
    /// Set when a cancel would leave the guest without its memory.
    pub(super) committed: Arc<AtomicBool>,
    pub(super) memory_lost: Arc<AtomicBool>,
    report: Arc<Mutex<WorkReport>>,
    /// Who waits for the end, where the job is not in the list.
    asker: Option<Arc<Mutex<Option<Asker>>>>,
    /// Whoever is answered when the job is over, or before.
    answer: Arc<Mutex<Option<qmp::Reply>>>,
}

/// A line of the monitor that is done by what jobs do.
pub(super) struct Asker {
    /// Where the text goes.
    pub(super) reply: qmp::Reply,
    /// What is done after this, if that succeeds.
    pub(super) then: Option<Task>,
}

impl Work for Handle {
    fn progress(&self) -> (u64, u64) {
        match self.progress.get() {
            // A delete, or work that has not found out yet how much there is.
            (current, 0) => (current, 1),
            known => known,
        }
    }

    fn pause(&mut self) -> bool {
        self.progress.pause();
        true
    }

    fn resume(&mut self) {
        self.progress.resume();
    }

    fn report(&self) -> WorkReport {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancel(&mut self, _force: bool) -> bool {
        let possible = !self.committed.load(Ordering::Acquire);
        if possible {
            self.progress.cancel();
        }
        possible
    }
}

impl Handle {
    fn take_asker(&self) -> Option<Asker> {
        let asker = self.asker.as_ref()?;
        asker.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn new(list: JobList, id: String, answer: Option<qmp::Reply>) -> Self {
        let rests = move || list.report(|jobs| jobs.paused(&id));
        Self {
            progress: Arc::new(Progress::watched(rests)),
            committed: Arc::default(),
            memory_lost: Arc::default(),
            report: Arc::default(),
            asker: None,
            answer: Arc::new(Mutex::new(answer)),
        }
    }

    /// Of work that is in no list.
    pub(super) fn unlisted(list: JobList) -> Self {
        Self::new(list, String::new(), None)
    }

    /// Whoever is still to be answered.
    fn take_answer(&self) -> Option<qmp::Reply> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the list still has the job. To be asked with the list's lock held.
    fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.progress) > 1
    }
}

impl SnapshotJobs {
    pub(super) fn new(list: JobList) -> Self {
        Self { list, waiting: VecDeque::new(), current: None, rewinding: None }
    }

    /// What the working job has done so far is of no use.
    pub(super) fn give_up_current(&self) {
        if let Some(current) = &self.current {
            current.handle.progress.cancel();
        }
    }

    /// The next job that has something to do, now running.
    fn next(&mut self) -> Option<Waiting> {
        while let Some(next) = self.waiting.pop_front() {
            // One that was cancelled meanwhile is concluded, and its id may be another job's.
            if next.handle.asker.is_some() {
                return Some(next);
            }
            let mut jobs = self.list.lock();
            if next.handle.is_wanted() {
                report(jobs.start(&next.id));
                drop(jobs);
                return Some(next);
            }
        }
        None
    }

    fn finish(&mut self, id: &str, outcome: work::Outcome) {
        let outcome = match outcome {
            Ok(()) => Outcome::Success,
            Err(WorkError::Cancelled) => Outcome::Cancelled,
            Err(WorkError::Failed(text)) => Outcome::Failure(text),
        };
        self.list.report(|jobs| jobs.finish(id, outcome));
    }
}

/// The list refuses only what a bug can bring about.
fn report(result: Result<(), StateError>) {
    if let Err(error) = result {
        error!("{error}");
    }
}

impl Controller {
    /// Adds a job, and starts it if no other works.
    pub(super) fn create_job(&mut self, id: String, task: Task) -> Result<(), qmp::Error> {
        self.check_no_migration()?;
        let kind = match &task {
            Task::Save(..) => JobType::SnapshotSave,
            Task::Load(..) => JobType::SnapshotLoad,
            Task::Delete { .. } => JobType::SnapshotDelete,
            Task::Transaction(..) => JobType::SnapshotSave,
        };
        let handle = Handle::new(self.jobs.list.clone(), id.clone(), None);
        self.jobs.list.lock().create(NewJob::new(&id, kind), Box::new(handle.clone()))?;
        self.jobs.waiting.push_back(Waiting { id, task, handle });
        self.start_next_job();
        Ok(())
    }

    /// Does what a line of the monitor asks for, when its turn comes, and answers.
    pub(super) fn run_for(&mut self, asker: Asker, task: Task) {
        let asker = Some(Arc::new(Mutex::new(Some(asker))));
        // It is not in the list: nobody can pause it.
        let handle = Handle { asker, ..Handle::new(self.jobs.list.clone(), String::new(), None) };
        self.jobs.waiting.push_back(Waiting { id: String::new(), task, handle });
        self.start_next_job();
    }

    /// The job is over.
    fn conclude(&mut self, id: &str, handle: &Handle, outcome: work::Outcome) {
        let Some(Asker { reply, then }) = handle.take_asker() else {
            return self.jobs.finish(id, outcome);
        };
        match (outcome, then) {
            (Ok(()), Some(task)) => self.run_for(Asker { reply, then: None }, task),
            (Ok(()), None) => reply.value(&""),
            (Err(WorkError::Cancelled), _) => reply.value(&"Error: Operation canceled\r\n"),
            (Err(WorkError::Failed(text)), _) => reply.value(&format!("Error: {text}\r\n")),
        }
    }

    /// A transaction with the machine's state in it. It is answered when its moment has passed, or, if
    /// its job has no id, when all is written; or when it fails.
    pub(super) fn machine_transaction(
        &mut self,
        arguments: TransactionArguments,
        about: About,
        reply: qmp::Reply,
    ) {
        if let Err(error) = self.check_no_migration() {
            return reply.send(Err(error));
        }
        let given = arguments.actions.iter().find_map(|action| match action {
            TransactionAction::VmstateSave(arguments) => arguments.job_id.clone(),
            _ => None,
        });
        let (id, hidden) = match given {
            Some(id) => (id, false),
            None => (HIDDEN.to_owned(), true),
        };
        if let Err(error) = self.check_no_snapshot_job() {
            return reply.send(Err(error));
        }
        let handle = Handle::new(self.jobs.list.clone(), id.clone(), Some(reply));
        let auto = AutoFlags { finalize: true, dismiss: hidden };
        let new = NewJob { auto, hidden, ..NewJob::new(&id, JobType::SnapshotSave) };
        if let Err(error) = self.jobs.list.lock().create(new, Box::new(handle.clone())) {
            if let Some(reply) = handle.take_answer() {
                reply.send(Err(error));
            }
            return;
        }
        let task = Task::Transaction(arguments, about);
        self.jobs.waiting.push_back(Waiting { id, task, handle });
        self.start_next_job();
    }

    /// The moment of the current job's transaction has passed.
    fn transaction_passed(&self) {
        let reply = self.jobs.current.as_ref().and_then(|current| current.handle.take_answer());
        if let Some(reply) = reply {
            reply.send(Ok(serde_json::json!({})));
        }
    }

    /// For commands that cannot be done meanwhile.
    pub(super) fn check_no_snapshot_job(&self) -> Result<(), qmp::Error> {
        if self.jobs.current.is_some() || !self.jobs.waiting.is_empty() {
            let text = "A snapshot job is under way: wait for its end, or cancel it";
            return Err(qmp::Error::generic(text));
        }
        Ok(())
    }

    pub(super) fn start_next_job(&mut self) {
        while self.jobs.current.is_none() && !self.ending {
            let Some(Waiting { id, task, handle }) = self.jobs.next() else { return };
            if let Task::Load(target, mode) = &task
                && self.can_rewind(target, *mode)
            {
                self.jobs.current = Some(Current { id, handle, thread: None });
                self.jobs.rewinding = Some(task);
                return;
            }
            self.start_job(id, task, handle);
        }
    }

    /// Starts the thread of a job.
    pub(super) fn start_job(&mut self, id: String, task: Task, handle: Handle) {
        match work::start(task, self.work_context(&handle)) {
            Ok(thread) => {
                self.jobs.current = Some(Current { id, handle, thread: Some(thread) });
            }
            Err(error) => {
                let text = format!("Cannot start the job's thread: {error}");
                self.release_guest(false, false);
                if let Some(reply) = handle.take_answer() {
                    reply.send(Err(qmp::Error::generic(text.clone())));
                }
                self.conclude(&id, &handle, Err(WorkError::Failed(text)));
            }
        }
    }

    /// What a job's thread works with.
    pub(super) fn work_context(&self, handle: &Handle) -> WorkContext {
        WorkContext {
            blocks: Arc::clone(&self.blocks),
            graph: Arc::clone(self.blocks.graph()),
            memory: self.machine.memory().clone(),
            config: recorded::describe(&self.machine),
            shape: self.machine.shape(),
            presence: self.machine.devices().presence().clone(),
            orders: Arc::clone(&self.orders),
            missing: self.machine.missing().cloned(),
            lineage: Arc::clone(self.blocks.lineage()),
            progress: Arc::clone(&handle.progress),
            memory_lost: Arc::clone(&handle.memory_lost),
            mailbox: self.mailbox.clone(),
        }
    }

    /// What the working job wants.
    pub(super) fn work_message(&mut self, message: WorkMessage) {
        // Whoever asked waits for the answer, so it is there to receive it.
        match message {
            WorkMessage::Freeze { purpose, reply } => {
                let _ = reply.send(self.freeze(&purpose));
            }
            WorkMessage::Track { reply } => {
                let _ = reply.send(self.track());
            }
            WorkMessage::Collect { reply } => {
                let _ = reply.send(self.collect());
            }
            WorkMessage::Thaw { guarded } => {
                self.guarded = guarded;
                // Not where a reset was asked for in the pause, and must wait.
                self.release_guest(true, false);
            }
            WorkMessage::Unguarded => {
                self.guarded = false;
                // A reset may have waited for it.
                self.release_guest(true, false);
            }
            WorkMessage::Passed => self.transaction_passed(),
            WorkMessage::Saved { base, report, rewind } => {
                if self.machine.is_tracking() {
                    self.machine.tracker().saved(base);
                    self.rewind = rewind;
                }
                self.job_report(|job| {
                    job.written = i64::try_from(report.bytes_written).ok();
                    job.incremental = Some(report.incremental);
                });
            }
            WorkMessage::Restore { loaded, reply } => {
                let Loaded { rewind, missing } = *loaded;
                self.inbox.guest_replaced();
                let restored = self.restore(rewind.state(), rewind.base().clone(), missing);
                self.rewind = restored.is_ok().then(|| Box::new(rewind));
                let _ = reply.send(restored);
            }
            WorkMessage::Run => self.release_guest(true, true),
            WorkMessage::Migration(step) => self.migration_step(step),
            WorkMessage::Doing { reply } => {
                let _ = reply.send(Ok(self.doing()));
            }
            WorkMessage::LetGo { reply } => {
                // RAM is whole: what a load had left in its image has been read.
                self.rewind = None;
                self.machine.forget_missing();
                let _ = reply.send(Ok(()));
            }
            WorkMessage::Final { reply } => {
                let _ = reply.send(self.migration_leaves());
            }
            WorkMessage::Arrived { arrived, reply } => {
                let _ = reply.send(self.arrived(&arrived));
            }
            WorkMessage::Done(outcome) => self.job_done(outcome),
        }
    }

    fn restore(
        &mut self,
        state: &MachineState,
        base: Base,
        missing: Option<Arc<Missing>>,
    ) -> Result<(), WorkError> {
        self.machine.restore(state, Some(base))?;
        match missing {
            Some(missing) => self.machine.set_missing(missing)?,
            None => self.machine.forget_missing(),
        }
        Ok(())
    }

    fn freeze(&mut self, purpose: &Freeze) -> Result<Frozen, WorkError> {
        if self.ending {
            return Err(WorkError::Cancelled);
        }
        match purpose {
            Freeze::Save => self.freeze_to_save(RunState::SaveVm),
            Freeze::Migrate => {
                self.migration_stops();
                self.freeze_to_save(RunState::FinishMigrate)
            }
            Freeze::Load(state) => self.freeze_to_load(state),
        }
    }

    /// A save begins.
    fn track(&mut self) -> Result<Tracked, WorkError> {
        self.check_savable()?;
        self.machine.start_tracking()?;
        Ok(Tracked {
            base: self.machine.tracker().base().cloned(),
            logged: self.machine.is_tracking(),
            state_bytes: self.machine.most_state_bytes()?,
        })
    }

    /// A round of a save begins.
    fn collect(&mut self) -> Result<PageSet, WorkError> {
        self.check_savable()?;
        // A reset since the last round has turned it off.
        self.machine.start_tracking()?;
        self.machine.note_written(Protect::Again)?;
        Ok(self.machine.tracker().take())
    }

    fn check_savable(&self) -> Result<(), WorkError> {
        if self.ending {
            return Err(WorkError::Cancelled);
        }
        if self.state == RunState::RestoreVm {
            let text = "There is nothing to save: the guest's memory was lost in a failed load";
            return Err(WorkError::Failed(text.to_owned()));
        }
        Ok(())
    }

    fn freeze_to_save(&mut self, state: RunState) -> Result<Frozen, WorkError> {
        self.check_savable()?;
        self.hold_guest(state)?;
        let state = self.machine.capture()?;
        self.machine.note_written(Protect::Again)?;
        Ok(Frozen { state, pages: self.machine.tracker().take() })
    }

    /// A save kept the guest standing for so long.
    pub(super) fn guest_was_held(&mut self, pause: Duration) {
        self.pauses.record(pause);
        self.job_report(|job| {
            // A save may try more than once.
            let before = job.longest_pause.unwrap_or(0);
            job.longest_pause = Some(before.max(nanoseconds(pause)));
        });
    }

    fn job_report(&self, change: impl FnOnce(&mut WorkReport)) {
        if let Some(current) = &self.jobs.current {
            change(&mut current.handle.report.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn freeze_to_load(&mut self, state: &MachineState) -> Result<Frozen, WorkError> {
        self.machine.check_fits(state)?;
        if self.machine.is_halted() {
            // It waits for memory that cannot be read, and will not get it any more.
            if let Some(current) = &self.jobs.current {
                current.handle.memory_lost.store(true, Ordering::Release);
            }
            self.machine.pause_for_good()?;
        }
        self.hold_guest(RunState::RestoreVm)?;
        let pages = self.machine.tracker().dirty().empty_like();
        let frozen = Frozen { state: self.machine.capture()?, pages };
        if let Some(current) = &self.jobs.current {
            // A cancel that came before this has been heard; the job looks once more.
            current.handle.committed.store(true, Ordering::Release);
        }
        Ok(frozen)
    }

    pub(super) fn job_done(&mut self, outcome: work::Outcome) {
        if self.migrates() {
            return self.migration_done(outcome);
        }
        let lost = |current: &Current| current.handle.memory_lost.load(Ordering::Acquire);
        let memory_lost = self.jobs.current.as_ref().is_some_and(lost);
        if memory_lost && outcome.is_err() {
            self.machine.tracker().forget();
            self.machine.forget_missing();
        }
        // What a save took and did not bring to its end.
        self.machine.tracker().failed();
        self.guarded = false;
        self.release_guest(outcome.is_ok(), memory_lost);
        let Some(current) = self.jobs.current.take() else { return };
        if current.thread.is_some_and(|thread| thread.join().is_err()) {
            error!("the thread of job '{}' has panicked", current.id);
        }
        let answer = match &outcome {
            Ok(()) => Ok(serde_json::json!({})),
            Err(WorkError::Cancelled) => Err(qmp::Error::generic("Operation canceled")),
            Err(WorkError::Failed(text)) => Err(qmp::Error::generic(text.clone())),
        };
        self.conclude(&current.id, &current.handle, outcome);
        if let Some(reply) = current.handle.take_answer() {
            if answer.is_err() {
                // The client hears of the failure now: there is nothing to be looked up later.
                let _ = self.jobs.list.lock().dismiss(&current.id);
            }
            reply.send(answer);
        }
        self.start_next_job();
    }

    /// Cancels what can be cancelled and waits for the rest, so that no image is left half changed.
    pub(super) fn abandon_jobs(&mut self) {
        self.jobs.list.lock().close();
        self.end_migration();
        while self.jobs.current.is_some() {
            match self.inbox.wait() {
                Some(Message::Work(message)) => self.work_message(message),
                Some(_) => {}
                None => return,
            }
        }
        self.jobs.list.finish();
    }
}
