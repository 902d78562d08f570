//! Groups: jobs of one transaction that end together. A job of its own is a group of one.
//!
//! ```text
//!           all wait                         finalize (by itself, or told once for all)
//!   open ─────────────> (open, all pending) ───────────> committing ──> each, the newest first:
//!    │                          │                            │            settle, events, concluded
//!    │ one fails or is          │ one is cancelled           │ one cannot be committed
//!    │ cancelled                │                            │
//!    └──────────────────────────┴────────────────────────────┴───> aborting ──> the same, once its
//!                                                                               work has ended
//! ```

use super::job::{CANCELLED, Cancel, End, Job};
use super::work::{Settle, Step};
use super::{Jobs, StateError};
use crate::schema::JobStatus;

/// Called when all jobs of a group are concluded.
pub(super) type Waiter = Box<dyn FnOnce() + Send>;

/// What a group is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Phase {
    /// Its jobs work, or wait for others, or for a client.
    #[default]
    Open,
    /// What they did is made to count.
    Committing,
    /// What they did is undone.
    Aborting,
}

#[derive(Default)]
pub(super) struct Group {
    pub(super) phase: Phase,
    pub(super) waiters: Vec<Waiter>,
}

impl Jobs {
    /// The place of the newest job of a group.
    fn newest(&self, group: u64) -> Option<usize> {
        self.jobs.iter().rposition(|job| job.group == Some(group))
    }

    fn members(&mut self, group: u64) -> impl Iterator<Item = &mut Job> {
        self.jobs.iter_mut().rev().filter(move |job| job.group == Some(group))
    }

    pub(super) fn phase(&self, group: u64) -> Phase {
        self.groups.get(&group).map_or(Phase::Open, |group| group.phase)
    }

    fn set_phase(&mut self, group: u64, phase: Phase) {
        if let Some(group) = self.groups.get_mut(&group) {
            group.phase = phase;
        }
    }

    /// A job has come to wait: once all do, they are pending, and go on if no client is to say so.
    pub(super) fn waits(&mut self, group: u64) -> Result<(), StateError> {
        if self.members(group).any(|job| job.status != JobStatus::Waiting) {
            return Ok(());
        }
        let Self { jobs, sink, .. } = self;
        let mut manual = false;
        for job in jobs.iter_mut().rev().filter(|job| job.group == Some(group)) {
            job.become_pending(sink)?;
            manual |= !job.auto.finalize;
        }
        if manual { Ok(()) } else { self.commit(group) }
    }

    /// Makes what a pending group did count.
    pub(super) fn commit(&mut self, group: u64) -> Result<(), StateError> {
        if self.phase(group) == Phase::Open {
            self.set_phase(group, Phase::Committing);
        }
        self.advance(group)
    }

    /// Undoes what a group did. `first` is the job that it is because of, and is not cancelled by
    /// this.
    pub(super) fn abort(&mut self, group: u64, first: &str) -> Result<(), StateError> {
        if self.phase(group) != Phase::Aborting {
            self.set_phase(group, Phase::Aborting);
            let Self { jobs, sink, .. } = self;
            for job in jobs.iter_mut().filter(|job| job.group == Some(group) && job.id != first) {
                if job.is_at_work() && job.cancel != Cancel::Force {
                    if let Some(work) = &mut job.work {
                        // What cannot end early is waited for.
                        work.cancel(true);
                    }
                    job.resume(sink)?;
                }
                job.cancel = Cancel::Force;
            }
        }
        self.advance(group)
    }

    /// Brings a group that is ending as far as it can be brought now.
    pub(super) fn advance(&mut self, group: u64) -> Result<(), StateError> {
        while let Some(at) = self.newest(group) {
            let how = match self.phase(group) {
                Phase::Open => return Ok(()),
                Phase::Committing => Settle::Commit,
                Phase::Aborting => Settle::Abort,
            };
            let Self { jobs, sink, .. } = self;
            let job = &mut jobs[at];
            if job.is_at_work() {
                return Ok(());
            }
            if how == Settle::Abort && job.status != JobStatus::Aborting {
                job.fail(CANCELLED.into(), sink)?;
            }
            match settle(job, how) {
                None => return Ok(()),
                Some(Err(text)) if how == Settle::Commit => {
                    // A commit that fails has undone itself.
                    job.fail(text, sink)?;
                    let id = job.id.clone();
                    self.conclude(at)?;
                    self.abort(group, &id)?;
                }
                Some(_) => self.conclude(at)?,
            }
        }
        for waiter in self.groups.remove(&group).map(|group| group.waiters).unwrap_or_default() {
            waiter();
        }
        Ok(())
    }

    fn conclude(&mut self, at: usize) -> Result<(), StateError> {
        let Self { jobs, sink, .. } = self;
        let result = jobs[at].conclude(sink);
        self.forget_gone();
        result
    }
}

/// Has the work end; none as long as it does. Work that was asked to commit finishes that, whatever
/// is wanted meanwhile.
fn settle(job: &mut Job, how: Settle) -> Option<Result<(), String>> {
    if job.end == End::Open {
        let step = job.work.as_mut().map_or(Step::Done, |work| work.settle(how));
        job.end = match step {
            Step::Done => End::Told(Ok(())),
            Step::Later => End::Asked,
        };
    }
    match &job.end {
        End::Told(result) => Some(result.clone()),
        _ => None,
    }
}
