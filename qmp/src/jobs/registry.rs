//! The list of jobs.

use std::fmt;

use super::state;
use crate::Error;
use crate::schema::{Event, JobInfo, JobStatus, JobType, JobVerb};

/// What query-jobs tells of work beyond QEMU's schema.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkReport {
    /// Nanoseconds that it kept the guest standing, the longest time in one piece.
    pub longest_pause: Option<i64>,
    /// Bytes written.
    pub written: Option<i64>,
    /// Whether it wrote only what changed.
    pub incremental: Option<bool>,
}

/// A job's work, as the list sees it. Its methods only ask; they return at once.
pub trait Work: Send {
    /// Done so far, and the expected sum; in any unit.
    fn progress(&self) -> (u64, u64);

    /// What else is known of it.
    fn report(&self) -> WorkReport {
        WorkReport::default()
    }

    /// Asks the work to end early, if it can at this moment; whether it can. The outcome is still
    /// told by [`Jobs::finish`]: it may be a success, when there was no more time to stop.
    fn cancel(&mut self) -> bool {
        false
    }

    /// Asks the work to rest, if it can; whether it can. [`Jobs::paused`] tells that it does.
    fn pause(&mut self) -> bool {
        false
    }

    /// Asks the work to go on after a pause, requested or reached.
    fn resume(&mut self) {}

    /// Asks work that is ready to complete.
    fn complete(&mut self) {}
}

/// Which steps at the end of a job happen by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AutoFlags {
    /// Go from pending to concluded without `job-finalize`.
    pub finalize: bool,
    /// Disappear when concluded, without `job-dismiss`.
    pub dismiss: bool,
}

impl AutoFlags {
    /// The flags that a job of this type has when the client sets none: jobs that report their
    /// result in the list alone stay there.
    pub fn of(kind: JobType) -> Self {
        let dismiss =
            matches!(kind, JobType::Commit | JobType::Stream | JobType::Mirror | JobType::Backup);
        Self { finalize: true, dismiss }
    }
}

/// How a job's work ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Success,
    /// It failed, and this is why.
    Failure(String),
    /// It was ended by [`Work::cancel`].
    Cancelled,
}

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

struct Job {
    id: String,
    kind: JobType,
    status: JobStatus,
    auto: AutoFlags,
    /// Gone when the job is concluded, and with it all that it holds.
    work: Option<Box<dyn Work>>,
    /// The last progress of work that is gone.
    progress: (u64, u64),
    /// The last report of work that is gone.
    report: WorkReport,
    error: Option<String>,
    user_paused: bool,
    cancelled: bool,
}

type Sink = Box<dyn FnMut(&Event) + Send>;

/// The list of jobs. It tells every change of state as a JOB_STATUS_CHANGE.
pub struct Jobs {
    /// Oldest first.
    jobs: Vec<Job>,
    sink: Sink,
}

impl Jobs {
    /// An empty list, which tells its events to `sink`.
    pub fn new(sink: impl FnMut(&Event) + Send + 'static) -> Self {
        Self { jobs: Vec::new(), sink: Box::new(sink) }
    }

    /// Adds a job: created, not yet started.
    ///
    /// # Errors
    /// When the id is malformed or taken, also by a concluded job that was not dismissed.
    pub fn create(
        &mut self,
        id: &str,
        kind: JobType,
        auto: AutoFlags,
        work: Box<dyn Work>,
    ) -> Result<(), Error> {
        if !is_valid_id(id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.iter().any(|job| job.id == id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        let mut job = Job {
            id: id.to_owned(),
            kind,
            status: JobStatus::Undefined,
            auto,
            work: Some(work),
            progress: (0, 0),
            report: WorkReport::default(),
            error: None,
            user_paused: false,
            cancelled: false,
        };
        let created = job.become_(JobStatus::Created, &mut self.sink);
        self.jobs.push(job);
        created.map_err(Error::from)
    }

    /// The work begins.
    ///
    /// # Errors
    /// When there is no such job, or it is not just created.
    pub fn start(&mut self, id: &str) -> Result<(), StateError> {
        self.reported(id, |job, sink| job.become_(JobStatus::Running, sink))
    }

    /// The work rests, as [`Work::pause`] asked. Ignored when it was asked to go on meanwhile.
    ///
    /// # Errors
    /// When there is no such job, or it is not at work.
    pub fn paused(&mut self, id: &str) -> Result<(), StateError> {
        self.reported(id, |job, sink| match job.status {
            _ if !job.user_paused => Ok(()),
            JobStatus::Paused | JobStatus::Standby => Ok(()),
            JobStatus::Ready => job.become_(JobStatus::Standby, sink),
            _ => job.become_(JobStatus::Paused, sink),
        })
    }

    /// The work could complete whenever it is told to.
    ///
    /// # Errors
    /// When there is no such job, or it is not running.
    pub fn ready(&mut self, id: &str) -> Result<(), StateError> {
        self.reported(id, |job, sink| job.become_(JobStatus::Ready, sink))
    }

    /// The work has ended. The job goes on to concluded, or to pending if a client finalizes it.
    ///
    /// # Errors
    /// When there is no such job, or its work has not begun, or had already ended.
    pub fn finish(&mut self, id: &str, outcome: Outcome) -> Result<(), StateError> {
        self.reported(id, |job, sink| {
            job.unpause(sink)?;
            match outcome {
                Outcome::Success => {
                    // Alone in its transaction, a job waits for no one.
                    job.become_(JobStatus::Waiting, sink)?;
                    job.become_(JobStatus::Pending, sink)?;
                    if job.auto.finalize { job.conclude(sink) } else { Ok(()) }
                }
                Outcome::Failure(text) => job.abort(text, sink),
                Outcome::Cancelled => job.abort(CANCELLED.into(), sink),
            }
        })
    }

    /// `job-cancel`.
    ///
    /// # Errors
    /// When there is no such job, or its state or its work does not allow it now.
    pub fn cancel(&mut self, id: &str) -> Result<(), Error> {
        self.verb(id, JobVerb::Cancel, |job, sink| match job.status {
            JobStatus::Created | JobStatus::Waiting | JobStatus::Pending => {
                job.abort(CANCELLED.into(), sink).map_err(Error::from)
            }
            _ if job.cancelled => Ok(()),
            _ => {
                if !job.work.as_mut().is_some_and(|work| work.cancel()) {
                    return Err(job.refusal(JobVerb::Cancel));
                }
                job.cancelled = true;
                job.resume(sink)
            }
        })
    }

    /// `job-pause`.
    ///
    /// # Errors
    /// When there is no such job, its state or its work does not allow it, or it was paused already.
    pub fn pause(&mut self, id: &str) -> Result<(), Error> {
        self.verb(id, JobVerb::Pause, |job, _| {
            if job.user_paused {
                return Err(Error::generic("Job is already paused"));
            }
            if job.cancelled || !job.work.as_mut().is_some_and(|work| work.pause()) {
                return Err(job.refusal(JobVerb::Pause));
            }
            job.user_paused = true;
            Ok(())
        })
    }

    /// `job-resume`.
    ///
    /// # Errors
    /// When there is no such job, or it was not paused.
    pub fn resume(&mut self, id: &str) -> Result<(), Error> {
        // In any state, the verb table notwithstanding.
        if !self.find(id)?.user_paused {
            return Err(Error::generic("Can't resume a job that was not paused"));
        }
        self.verb(id, JobVerb::Resume, Job::resume)
    }

    /// `job-complete`.
    ///
    /// # Errors
    /// When there is no such job, or it is not ready.
    pub fn complete(&mut self, id: &str) -> Result<(), Error> {
        self.verb(id, JobVerb::Complete, |job, _| {
            if let Some(work) = &mut job.work {
                work.complete();
            }
            Ok(())
        })
    }

    /// `job-finalize`.
    ///
    /// # Errors
    /// When there is no such job, or it is not pending.
    pub fn finalize(&mut self, id: &str) -> Result<(), Error> {
        self.verb(id, JobVerb::Finalize, |job, sink| job.conclude(sink).map_err(Error::from))
    }

    /// `job-dismiss`.
    ///
    /// # Errors
    /// When there is no such job, or it is not concluded.
    pub fn dismiss(&mut self, id: &str) -> Result<(), Error> {
        self.verb(id, JobVerb::Dismiss, |job, sink| {
            job.become_(JobStatus::Null, sink).map_err(Error::from)
        })
    }

    /// `query-jobs`: all jobs, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.jobs.iter().rev().map(Job::info).collect()
    }

    /// One job.
    pub fn get(&self, id: &str) -> Option<JobInfo> {
        self.jobs.iter().find(|job| job.id == id).map(Job::info)
    }

    /// Before the end of the process: asks all work to end, and forgets concluded jobs. The jobs
    /// that are left conclude with [`Jobs::finish`], and are to be closed once more.
    ///
    /// Returns how many are left.
    pub fn close(&mut self) -> usize {
        let ids: Vec<String> = self.jobs.iter().map(|job| job.id.clone()).collect();
        for id in ids {
            // What cannot be cancelled ends by itself; what is concluded cannot be.
            let _ = self.cancel(&id);
            let _ = self.dismiss(&id);
        }
        self.jobs.len()
    }

    fn find(&mut self, id: &str) -> Result<&mut Job, Error> {
        self.jobs.iter_mut().find(|job| job.id == id).ok_or_else(Error::job_not_found)
    }

    /// Applies a client's verb, if the state allows it.
    fn verb(
        &mut self,
        id: &str,
        verb: JobVerb,
        apply: impl FnOnce(&mut Job, &mut Sink) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let job = self.jobs.iter_mut().find(|job| job.id == id).ok_or_else(Error::job_not_found)?;
        if !state::accepts(job.status, verb) {
            return Err(job.refusal(verb));
        }
        let result = apply(job, &mut self.sink);
        self.jobs.retain(|job| job.status != JobStatus::Null);
        result
    }

    /// Applies what the work reported.
    fn reported(
        &mut self,
        id: &str,
        apply: impl FnOnce(&mut Job, &mut Sink) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let job = self.jobs.iter_mut().find(|job| job.id == id);
        let job = job.ok_or_else(|| StateError::NoJob(id.to_owned()))?;
        let result = apply(job, &mut self.sink);
        self.jobs.retain(|job| job.status != JobStatus::Null);
        result
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Jobs").field("jobs", &self.query()).finish_non_exhaustive()
    }
}

/// The error of a cancelled job: strerror(ECANCELED), which clients know.
const CANCELLED: &str = "Operation canceled";

impl Job {
    fn become_(&mut self, to: JobStatus, sink: &mut Sink) -> Result<(), StateError> {
        if !state::may_become(self.status, to) {
            let (id, from) = (self.id.clone(), self.status);
            return Err(StateError::Transition { id, from, to });
        }
        self.status = to;
        sink(&Event::JobStatusChange { id: self.id.clone(), status: to });
        Ok(())
    }

    fn unpause(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        self.user_paused = false;
        match self.status {
            JobStatus::Paused => self.become_(JobStatus::Running, sink),
            JobStatus::Standby => self.become_(JobStatus::Ready, sink),
            _ => Ok(()),
        }
    }

    fn resume(&mut self, sink: &mut Sink) -> Result<(), Error> {
        if self.user_paused
            && let Some(work) = &mut self.work
        {
            work.resume();
        }
        self.unpause(sink).map_err(Error::from)
    }

    fn abort(&mut self, error: String, sink: &mut Sink) -> Result<(), StateError> {
        self.become_(JobStatus::Aborting, sink)?;
        self.error = Some(error);
        self.conclude(sink)
    }

    fn conclude(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        if let Some(work) = self.work.take() {
            self.progress = work.progress();
            self.report = work.report();
        }
        self.become_(JobStatus::Concluded, sink)?;
        if self.auto.dismiss { self.become_(JobStatus::Null, sink) } else { Ok(()) }
    }

    fn refusal(&self, verb: JobVerb) -> Error {
        Error::job_verb(&self.id, self.status.as_str(), verb.as_str())
    }

    fn info(&self) -> JobInfo {
        let (current, total) = self.work.as_ref().map_or(self.progress, |work| work.progress());
        let report = self.work.as_ref().map_or(self.report, |work| work.report());
        let clamp = |progress| i64::try_from(progress).unwrap_or(i64::MAX);
        JobInfo {
            id: self.id.clone(),
            kind: self.kind,
            status: self.status,
            current_progress: clamp(current),
            total_progress: clamp(total),
            error: self.error.clone(),
            pause_ns: report.longest_pause,
            bytes_written: report.written,
            incremental: report.incremental,
        }
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
