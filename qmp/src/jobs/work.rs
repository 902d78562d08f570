//! What a job does, as the list sees it.

use crate::Error;
use crate::schema::{JobType, MirrorCopyMode};

/// What query-jobs tells of work beyond QEMU's schema.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkReport {
    /// Nanoseconds that it kept the guest standing, the longest time in one piece.
    pub longest_pause: Option<i64>,
    /// Bytes written.
    pub written: Option<i64>,
    /// Whether it wrote only what changed.
    pub incremental: Option<bool>,
    /// Of a mirror: whether the target has all of the source, and each write goes to both.
    pub synced: Option<bool>,
}

/// How a job ends, once its work is done and that of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settle {
    /// What was done is to count.
    Commit,
    /// All is to be as it was before the job.
    Abort,
}

/// Whether something that was asked of work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is.
    Done,
    /// It will be told by [`crate::jobs::Jobs::settled`].
    Later,
}

/// A job's work, as the list sees it. Its methods only ask; they return at once, and may be called
/// with locks held: they must not report to the list themselves.
pub trait Work: Send {
    /// Done so far, and the expected sum; in any unit. Neither becomes less.
    fn progress(&self) -> (u64, u64);

    /// What else is known of it.
    fn report(&self) -> WorkReport {
        WorkReport::default()
    }

    /// Asks the work to end early, if it can at this moment; whether it can. The outcome is still
    /// told by [`crate::jobs::Jobs::finish`]: it may be a success, when there was no more time to
    /// stop. Without `force`, which only work that [can complete](Work::can_complete) and is ready
    /// is asked for, it ends with a success that changes nothing.
    fn cancel(&mut self, _force: bool) -> bool {
        false
    }

    /// Asks the work to rest, if it can; whether it can. [`crate::jobs::Jobs::paused`] tells that it
    /// does.
    fn pause(&mut self) -> bool {
        false
    }

    /// Asks the work to go on after a pause, requested or reached.
    fn resume(&mut self) {}

    /// Whether it becomes ready, and waits to be told to complete.
    fn can_complete(&self) -> bool {
        false
    }

    /// Asks work that is ready to complete.
    fn complete(&mut self) {}

    /// Bytes a second at most from now on; 0 is no limit.
    fn set_speed(&mut self, _speed: u64) {}

    /// Another copy mode from now on.
    ///
    /// # Errors
    /// It cannot be changed, or not to this.
    fn change(&mut self, _mode: MirrorCopyMode) -> Result<(), Error> {
        Err(Error::generic("Job type does not support change"))
    }

    /// Asks work that has finished to end.
    fn settle(&mut self, _how: Settle) -> Step {
        Step::Done
    }
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
        Self { finalize: true, dismiss: is_block(kind) }
    }
}

/// Whether jobs of this type are block jobs: listed by query-block-jobs, with events of their own.
pub(crate) fn is_block(kind: JobType) -> bool {
    matches!(kind, JobType::Commit | JobType::Stream | JobType::Mirror | JobType::Backup)
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
