//! Snapshot jobs: one works at a time, the next waits in state created.

mod handle;
mod requests;
mod transaction;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use qmp::jobs::{NewJob, Outcome, StateError};
use qmp::schema::JobType;
use tracing::error;

use super::Controller;
use super::mailbox::Message;
use super::work::{self, Task, WorkContext, WorkError};
use crate::blocks::jobs::JobList;
use crate::machine::recorded;
use handle::Asker;
pub(super) use handle::{Handle, Line};

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
    work: Queued,
    handle: Handle,
}

/// What waits for its turn.
enum Queued {
    Task(Task),
    Line(Line),
}

pub(super) struct Current {
    pub(super) id: String,
    pub(super) handle: Handle,
    /// None for what the main thread does itself.
    pub(super) thread: Option<JoinHandle<()>>,
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
        self.jobs.waiting.push_back(Waiting { id, work: Queued::Task(task), handle });
        self.start_next_job();
        Ok(())
    }

    /// Does what a line of the monitor asks for, when its turn comes, and answers.
    pub(super) fn run_line(&mut self, line: Line, reply: qmp::Reply) {
        let waiting = self.waiting_line(line, reply);
        self.jobs.waiting.push_back(waiting);
        self.start_next_job();
    }

    fn waiting_line(&self, line: Line, reply: qmp::Reply) -> Waiting {
        let asker = Some(Arc::new(Mutex::new(Some(Asker { reply, then: None }))));
        // It is not in the list: nobody can pause it.
        let handle = Handle { asker, ..Handle::new(self.jobs.list.clone(), String::new(), None) };
        Waiting { id: String::new(), work: Queued::Line(line), handle }
    }

    /// What is to be done now that the turn of something has come; a line that cannot be done is
    /// answered.
    fn task_of(&self, work: Queued, handle: &Handle) -> Option<Task> {
        let line = match work {
            Queued::Task(task) => return Some(task),
            Queued::Line(line) => line,
        };
        match self.task_of_line(&line) {
            Ok((task, then)) => {
                handle.set_then(then);
                Some(task)
            }
            Err(text) => {
                if let Some(Asker { reply, .. }) = handle.take_asker() {
                    reply.value(&text);
                }
                None
            }
        }
    }

    /// The job is over; the next may begin.
    fn conclude(&mut self, id: &str, handle: &Handle, outcome: work::Outcome) {
        let Some(Asker { reply, then }) = handle.take_asker() else {
            return self.jobs.finish(id, outcome);
        };
        match (outcome, then) {
            (Ok(()), Some(line)) => {
                // Nothing comes in between.
                let waiting = self.waiting_line(line, reply);
                self.jobs.waiting.push_front(waiting);
            }
            (Ok(()), None) => reply.value(&""),
            (Err(WorkError::Cancelled), _) => reply.value(&"Error: Operation canceled\r\n"),
            (Err(WorkError::Failed(text)), _) => reply.value(&format!("Error: {text}\r\n")),
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
            let Some(Waiting { id, work, handle }) = self.jobs.next() else { return };
            let Some(task) = self.task_of(work, &handle) else { continue };
            if let Task::Load(target, how) = &task
                && self.can_rewind(target, how.mode)
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
            shadows: Arc::clone(self.machine.shadows()),
            config: recorded::describe(&self.machine),
            shape: self.machine.shape(),
            presence: self.machine.devices().presence().clone(),
            orders: Arc::clone(self.machine.orders()),
            missing: self.machine.missing().cloned(),
            lineage: Arc::clone(self.blocks.lineage()),
            progress: Arc::clone(&handle.progress),
            memory_lost: Arc::clone(&handle.memory_lost),
            mailbox: self.mailbox.clone(),
        }
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
