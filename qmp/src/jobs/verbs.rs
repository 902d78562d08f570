//! What clients ask of jobs: the `job-*` and `block-job-*` commands.

use super::Jobs;
use super::group::Phase;
use super::job::{Cancel, Job};
use super::state;
use super::work::is_block;
use crate::schema::{JobStatus, JobVerb, MirrorCopyMode};
use crate::{Error, ErrorClass};

impl Jobs {
    /// `job-cancel`.
    ///
    /// # Errors
    /// When there is no such job, or its state or its work does not allow it now.
    pub fn cancel(&mut self, id: &str) -> Result<(), Error> {
        self.find(id)?;
        self.cancel_any(id)
    }

    /// As [`Jobs::cancel`], also of a job that no client knows of.
    pub(super) fn cancel_any(&mut self, id: &str) -> Result<(), Error> {
        self.cancel_as(id, Cancel::Force)
    }

    /// `block-job-cancel`: without `force`, a job that is ready ends with a success that changes
    /// nothing.
    ///
    /// # Errors
    /// As [`Jobs::cancel`]; or the job is paused, and is not forced.
    pub fn block_cancel(&mut self, id: &str, force: bool) -> Result<(), Error> {
        if self.find_block(id)?.user_paused && !force {
            let text = format!("The block job for device '{id}' is currently paused");
            return Err(Error::generic(text));
        }
        self.cancel_as(id, if force { Cancel::Force } else { Cancel::Soft })
    }

    fn cancel_as(&mut self, id: &str, how: Cancel) -> Result<(), Error> {
        let (at, group) = self.accepting(id, JobVerb::Cancel)?;
        let phase = self.phase(group);
        let Self { jobs, sink, .. } = self;
        let job = &mut jobs[at];
        if !job.is_at_work() {
            // Not begun, or done and without effect so far: undone, by whatever wish, as in QEMU. Too late
            // for one that is taking effect.
            if phase != Phase::Open {
                return Ok(());
            }
            job.cancel = Cancel::Force;
            return Ok(self.abort(group, id)?);
        }
        let soft = how == Cancel::Soft && job.is_ready() && job.can_complete();
        let how = if soft { Cancel::Soft } else { Cancel::Force };
        if phase == Phase::Aborting || job.cancel >= how {
            return Ok(());
        }
        if !job.work.as_mut().is_some_and(|work| work.cancel(!soft)) {
            return Err(job.refusal(JobVerb::Cancel));
        }
        job.cancel = how;
        Ok(job.resume(sink)?)
    }

    /// `job-pause`.
    ///
    /// # Errors
    /// When there is no such job, its state or its work does not allow it, or it was paused already.
    pub fn pause(&mut self, id: &str) -> Result<(), Error> {
        self.find(id)?;
        let (at, _) = self.accepting(id, JobVerb::Pause)?;
        let job = &mut self.jobs[at];
        if job.user_paused {
            return Err(Error::generic("Job is already paused"));
        }
        if job.cancel == Cancel::Force || !job.work.as_mut().is_some_and(|work| work.pause()) {
            return Err(job.refusal(JobVerb::Pause));
        }
        job.user_paused = true;
        Ok(())
    }

    /// `job-resume`.
    ///
    /// # Errors
    /// When there is no such job, or it was not paused.
    pub fn resume(&mut self, id: &str) -> Result<(), Error> {
        // Checked before the verb table, so that this text comes in every state.
        if !self.find(id)?.user_paused {
            return Err(Error::generic("Can't resume a job that was not paused"));
        }
        let (at, _) = self.accepting(id, JobVerb::Resume)?;
        let Self { jobs, sink, .. } = self;
        Ok(jobs[at].resume(sink)?)
    }

    /// `job-complete`. That of a paused job takes effect when it goes on.
    ///
    /// # Errors
    /// When there is no such job, or it is not ready, or is ending otherwise.
    pub fn complete(&mut self, id: &str) -> Result<(), Error> {
        self.find(id)?;
        let (at, _) = self.accepting(id, JobVerb::Complete)?;
        let job = &mut self.jobs[at];
        match &mut job.work {
            Some(work) if work.can_complete() && job.cancel == Cancel::No => {
                work.complete();
                Ok(())
            }
            _ => {
                let text = format!("The active block job '{id}' cannot be completed");
                Err(Error::generic(text))
            }
        }
    }

    /// `job-finalize`: of all that it ends with.
    ///
    /// # Errors
    /// When there is no such job, or it is not pending.
    pub fn finalize(&mut self, id: &str) -> Result<(), Error> {
        self.find(id)?;
        let (_, group) = self.accepting(id, JobVerb::Finalize)?;
        Ok(self.commit(group)?)
    }

    /// `job-dismiss`.
    ///
    /// # Errors
    /// When there is no such job, or it is not concluded.
    pub fn dismiss(&mut self, id: &str) -> Result<(), Error> {
        self.find(id)?;
        self.dismiss_any(id)
    }

    /// As [`Jobs::dismiss`], also of a job that no client knows of.
    pub(super) fn dismiss_any(&mut self, id: &str) -> Result<(), Error> {
        let (at, _) = self.accepting(id, JobVerb::Dismiss)?;
        let Self { jobs, sink, .. } = self;
        let result = jobs[at].become_(JobStatus::Null, sink);
        self.forget_gone();
        Ok(result?)
    }

    /// `block-job-set-speed`: bytes a second; 0 is no limit.
    ///
    /// # Errors
    /// When there is no such block job, its state does not allow it, or the speed is negative.
    pub fn set_speed(&mut self, id: &str, speed: i64) -> Result<(), Error> {
        self.find_block(id)?;
        let (at, _) = self.accepting(id, JobVerb::SetSpeed)?;
        let bytes = u64::try_from(speed)
            .map_err(|_| Error::out_of_range("speed", "a non-negative value"))?;
        let job = &mut self.jobs[at];
        job.speed = speed;
        if let Some(work) = &mut job.work {
            work.set_speed(bytes);
        }
        Ok(())
    }

    /// `block-job-change`.
    ///
    /// # Errors
    /// When there is no such block job, its state does not allow it, or it cannot be changed so.
    pub fn change(&mut self, id: &str, mode: MirrorCopyMode) -> Result<(), Error> {
        self.find_block(id)?;
        let (at, _) = self.accepting(id, JobVerb::Change)?;
        self.jobs[at].work.as_mut().map_or(Ok(()), |work| work.change(mode))
    }

    /// Checks that a block job of that name is there, for the `block-job-*` commands.
    ///
    /// # Errors
    /// Of class DeviceNotActive, also when there is such a job and it is no block job.
    pub fn require_block(&self, id: &str) -> Result<(), Error> {
        self.find_block(id).map(|_| ())
    }

    /// Whether the job was cancelled when it was ready, without force: it ends with success.
    pub fn is_ending_well(&self, id: &str) -> bool {
        self.find(id).is_ok_and(|job| job.cancel == Cancel::Soft)
    }

    fn find(&self, id: &str) -> Result<&Job, Error> {
        let job = self.jobs.iter().find(|job| job.id == id && !job.hidden);
        job.ok_or_else(Error::job_not_found)
    }

    fn find_block(&self, id: &str) -> Result<&Job, Error> {
        let job = self.find(id).ok().filter(|job| is_block(job.kind));
        job.ok_or_else(|| {
            Error::new(ErrorClass::DeviceNotActive, format!("Block job '{id}' not found"))
        })
    }

    /// The place and the group of a job whose state accepts the verb. Group 0 has no jobs.
    fn accepting(&self, id: &str, verb: JobVerb) -> Result<(usize, u64), Error> {
        let at = self.jobs.iter().position(|job| job.id == id).ok_or_else(Error::job_not_found)?;
        let job = &self.jobs[at];
        if !state::accepts(job.status, verb) {
            return Err(job.refusal(verb));
        }
        Ok((at, job.group.unwrap_or(0)))
    }
}

impl Job {
    fn can_complete(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.can_complete())
    }
}
