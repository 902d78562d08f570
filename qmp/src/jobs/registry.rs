//! The list of jobs, and what work reports to it.

use std::collections::BTreeMap;
use std::fmt;

use super::group::{Group, Phase};
use super::job::{CANCELLED, Cancel, End, Job};
use super::work::{AutoFlags, Outcome, Work, is_block};
use crate::Error;
use crate::schema::{
    BlockDeviceIoStatus, BlockErrorAction, BlockJobInfo, Event, IoOperationType, JobInfo,
    JobStatus, JobType,
};

/// The work reported something that its job's state does not allow: a mistake in this program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// There is no such job.
    #[error("job '{0}' does not exist")]
    NoJob(String),
    /// The job cannot go there.
    #[error("job '{id}' cannot go from state '{from}' to '{to}'")]
    Transition {
        /// The job.
        id: String,
        /// Its state.
        from: JobStatus,
        /// The state that it should have got.
        to: JobStatus,
    },
}

/// A job to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewJob<'a> {
    /// Its id.
    pub id: &'a str,
    /// What it does.
    pub kind: JobType,
    /// Which steps at its end happen by themselves.
    pub auto: AutoFlags,
    /// Bytes a second that its work starts with; 0 is no limit.
    pub speed: i64,
    /// The jobs that it ends with: of [`Jobs::new_group`]. None for a job of its own.
    pub group: Option<GroupId>,
    /// No client is to know of it: it is not listed and has no events.
    pub hidden: bool,
}

impl<'a> NewJob<'a> {
    /// A job of its own with what its type has by default.
    pub fn new(id: &'a str, kind: JobType) -> Self {
        Self { id, kind, auto: AutoFlags::of(kind), speed: 0, group: None, hidden: false }
    }
}

/// Jobs that end together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupId(u64);

/// What a failed request of a block job was, and what comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoFailure {
    /// What was tried.
    pub operation: IoOperationType,
    /// What is done about it; a job that stops is paused.
    pub action: BlockErrorAction,
    /// Whether there was no space.
    pub nospace: bool,
}

pub(super) type Sink = Box<dyn FnMut(&Event) + Send>;

/// The list of jobs. It tells every change of state as a JOB_STATUS_CHANGE, and those of block jobs
/// as BLOCK_JOB_* too.
pub struct Jobs {
    /// Oldest first.
    pub(super) jobs: Vec<Job>,
    pub(super) groups: BTreeMap<u64, Group>,
    next_group: u64,
    pub(super) sink: Sink,
}

impl Jobs {
    /// An empty list, which tells its events to `sink`.
    pub fn new(sink: impl FnMut(&Event) + Send + 'static) -> Self {
        Self { jobs: Vec::new(), groups: BTreeMap::new(), next_group: 0, sink: Box::new(sink) }
    }

    /// A group without jobs.
    pub fn new_group(&mut self) -> GroupId {
        self.next_group += 1;
        GroupId(self.next_group)
    }

    /// Adds a job: created, not yet started.
    ///
    /// # Errors
    /// When the id is malformed or taken, also by a concluded job that was not dismissed; a job of its
    /// group was started; or the speed is below 0: then the job goes again at once.
    pub fn create(&mut self, new: NewJob<'_>, work: Box<dyn Work>) -> Result<(), Error> {
        let NewJob { id, kind, auto, speed, group, hidden } = new;
        if !hidden && !is_valid_id(id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.iter().any(|job| job.id == id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        let GroupId(group) = group.unwrap_or_else(|| self.new_group());
        let begun = |job: &Job| job.group == Some(group) && job.status != JobStatus::Created;
        if self.jobs.iter().any(begun) {
            return Err(Error::generic(format!("The jobs that '{id}' is to end with have begun")));
        }
        let mut job = Job::new(id, kind, auto, work);
        (job.speed, job.group, job.hidden) = (speed, Some(group), hidden);
        let created = job.become_(JobStatus::Created, &mut self.sink);
        if speed < 0 {
            // Found when there is a job already, as in QEMU.
            created.and_then(|()| job.become_(JobStatus::Null, &mut self.sink))?;
            return Err(Error::out_of_range("speed", "a non-negative value"));
        }
        self.jobs.push(job);
        self.groups.entry(group).or_default();
        created.map_err(Error::from)
    }

    /// The work begins.
    ///
    /// # Errors
    /// When there is no such job, or it is not just created.
    pub fn start(&mut self, id: &str) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        job.become_(JobStatus::Running, sink)?;
        job.started = true;
        Ok(())
    }

    /// A job that was created and is not to be started goes without a trace but for its events.
    ///
    /// # Errors
    /// When there is no such job, or it was started.
    pub fn abandon(&mut self, id: &str) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        if job.status != JobStatus::Created {
            return Err(job.misplaced(JobStatus::Aborting));
        }
        let group = job.group;
        job.auto.dismiss = true;
        job.fail(CANCELLED.into(), sink)?;
        let result = job.conclude(sink);
        self.forget_gone();
        result?;
        // Nobody is left in it, or the others go the same way.
        group.map_or(Ok(()), |group| self.advance(group))
    }

    /// The work rests, as [`Work::pause`] asked. Ignored when it was asked to go on meanwhile.
    ///
    /// # Errors
    /// When there is no such job, or it is not at work.
    pub fn paused(&mut self, id: &str) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        match job.status {
            _ if !job.user_paused => Ok(()),
            JobStatus::Paused | JobStatus::Standby => Ok(()),
            JobStatus::Ready => job.become_(JobStatus::Standby, sink),
            _ => job.become_(JobStatus::Paused, sink),
        }
    }

    /// The work could complete whenever it is told to.
    ///
    /// # Errors
    /// When there is no such job, or it is not running.
    pub fn ready(&mut self, id: &str) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        job.become_ready(sink)
    }

    /// A request of the work failed. Where the action is to stop, the work rests until it is
    /// resumed, and tells so by [`Jobs::paused`].
    ///
    /// # Errors
    /// When there is no such job, or it is not at work.
    pub fn io_failed(&mut self, id: &str, failure: IoFailure) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        if !job.is_at_work() {
            return Err(job.misplaced(JobStatus::Paused));
        }
        let IoFailure { operation, action, nospace } = failure;
        job.tell(&Event::BlockJobError { device: job.id.clone(), operation, action }, sink);
        // One that is to end does not wait for anybody.
        if action == BlockErrorAction::Stop && job.cancel != Cancel::Force {
            job.user_paused = true;
            if job.io_status == BlockDeviceIoStatus::Ok {
                job.io_status = match nospace {
                    true => BlockDeviceIoStatus::Nospace,
                    false => BlockDeviceIoStatus::Failed,
                };
            }
        }
        Ok(())
    }

    /// The work has ended. The job waits for those of its group, and goes on as far as it may by
    /// itself.
    ///
    /// # Errors
    /// When there is no such job, or its work has not begun, or had already ended.
    pub fn finish(&mut self, id: &str, outcome: Outcome) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        if !job.is_at_work() {
            return Err(job.misplaced(JobStatus::Waiting));
        }
        let Some(group) = job.group else { return Err(job.misplaced(JobStatus::Waiting)) };
        let reason = match outcome {
            // What a block job did counts only once it is committed: there is time to give it up.
            Outcome::Success if is_block(job.kind) && job.cancel == Cancel::Force => {
                Some(CANCELLED.to_owned())
            }
            Outcome::Success => None,
            Outcome::Failure(text) => Some(text),
            Outcome::Cancelled => Some(CANCELLED.to_owned()),
        };
        match reason {
            Some(text) => {
                job.fail(text, sink)?;
                self.abort(group, id)
            }
            None if self.phase(group) == Phase::Aborting => self.advance_finished(id, group),
            None => {
                let (job, sink) = self.reporting(id)?;
                job.unpause(sink)?;
                job.become_(JobStatus::Waiting, sink)?;
                self.waits(group)
            }
        }
    }

    /// Work that succeeded, of a group that fails.
    fn advance_finished(&mut self, id: &str, group: u64) -> Result<(), StateError> {
        let (job, sink) = self.reporting(id)?;
        job.fail(CANCELLED.into(), sink)?;
        self.advance(group)
    }

    /// The work has ended as [`Work::settle`] asked, or could not.
    ///
    /// # Errors
    /// When there is no such job, or it was not asked.
    pub fn settled(&mut self, id: &str, result: Result<(), String>) -> Result<(), StateError> {
        let (job, _) = self.reporting(id)?;
        if job.end != End::Asked {
            return Err(job.misplaced(JobStatus::Concluded));
        }
        job.end = End::Told(result);
        let group = job.group;
        group.map_or(Ok(()), |group| self.advance(group))
    }

    /// Calls `waiter` when the job and those of its group are concluded, at once if they are. It may
    /// be called with the list's lock held.
    pub fn when_over(&mut self, id: &str, waiter: impl FnOnce() + Send + 'static) {
        let job = self.jobs.iter().find(|job| job.id == id);
        let group = job.and_then(|job| job.group).and_then(|group| self.groups.get_mut(&group));
        match group {
            Some(group) => group.waiters.push(Box::new(waiter)),
            None => waiter(),
        }
    }

    /// `query-jobs`: all jobs, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.visible().map(Job::info).collect()
    }

    /// `query-block-jobs`: the block jobs, newest first.
    pub fn query_block(&self) -> Vec<BlockJobInfo> {
        self.visible().filter(|job| is_block(job.kind)).map(Job::block_info).collect()
    }

    fn visible(&self) -> impl Iterator<Item = &Job> {
        self.jobs.iter().rev().filter(|job| !job.hidden)
    }

    /// One job.
    pub fn get(&self, id: &str) -> Option<JobInfo> {
        self.jobs.iter().find(|job| job.id == id).map(Job::info)
    }

    /// Before the end of the process: asks all work to end, and forgets concluded jobs. The jobs
    /// that are left conclude with [`Jobs::finish`] or [`Jobs::settled`], and are to be closed once
    /// more.
    ///
    /// Returns how many are left.
    pub fn close(&mut self) -> usize {
        let ids: Vec<String> = self.jobs.iter().map(|job| job.id.clone()).collect();
        for id in ids {
            // What cannot be cancelled ends by itself; what is concluded cannot be. Those that are
            // gone with their group are gone.
            let _ = self.cancel_any(&id);
            let _ = self.dismiss_any(&id);
        }
        self.jobs.len()
    }

    pub(super) fn forget_gone(&mut self) {
        self.jobs.retain(|job| job.status != JobStatus::Null);
    }

    /// The job that work reports on.
    fn reporting(&mut self, id: &str) -> Result<(&mut Job, &mut Sink), StateError> {
        let job = self.jobs.iter_mut().find(|job| job.id == id);
        Ok((job.ok_or_else(|| StateError::NoJob(id.to_owned()))?, &mut self.sink))
    }
}

impl Job {
    fn misplaced(&self, to: JobStatus) -> StateError {
        StateError::Transition { id: self.id.clone(), from: self.status, to }
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Jobs").field("jobs", &self.query()).finish_non_exhaustive()
    }
}

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        tracing::error!(%error, "a job is in an impossible state");
        Self::generic(error.to_string())
    }
}

/// A letter, then letters, digits, '-', '.' and '_' (QEMU's `id_wellformed`).
fn is_valid_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}
