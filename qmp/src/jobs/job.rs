//! One job: its state, what is known of it, and the events of its changes.

use super::state;
use super::work::{AutoFlags, Work, WorkReport, is_block};
use super::{Sink, StateError};
use crate::Error;
use crate::schema::{
    BlockDeviceIoStatus, BlockJobInfo, Event, JobInfo, JobStatus, JobType, JobVerb,
};

/// The error of a cancelled job: strerror(ECANCELED), which clients know.
pub(super) const CANCELLED: &str = "Operation canceled";

/// How far a job's end is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing was asked of its work.
    Open,
    /// It was asked to settle.
    Asked,
    /// It has, or could not.
    Told(Result<(), String>),
}

/// Whether a job is to end early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cancel {
    /// It is not.
    No,
    /// With a success that changes nothing.
    Soft,
    /// Whatever it is doing.
    Force,
}

pub(super) struct Job {
    pub(super) id: String,
    pub(super) kind: JobType,
    pub(super) status: JobStatus,
    pub(super) auto: AutoFlags,
    /// Gone when the job is concluded, and with it all that it holds.
    pub(super) work: Option<Box<dyn Work>>,
    /// The last progress of work that is gone.
    progress: (u64, u64),
    /// The last report of work that is gone.
    report: WorkReport,
    pub(super) error: Option<String>,
    pub(super) speed: i64,
    pub(super) io_status: BlockDeviceIoStatus,
    pub(super) user_paused: bool,
    pub(super) cancel: Cancel,
    /// What it ends with; none once it has.
    pub(super) group: Option<u64>,
    pub(super) started: bool,
    pub(super) end: End,
    /// No client knows of it.
    pub(super) hidden: bool,
}

impl Job {
    pub(super) fn new(id: &str, kind: JobType, auto: AutoFlags, work: Box<dyn Work>) -> Self {
        Self {
            id: id.to_owned(),
            kind,
            status: JobStatus::Undefined,
            auto,
            work: Some(work),
            progress: (0, 0),
            report: WorkReport::default(),
            error: None,
            speed: 0,
            io_status: BlockDeviceIoStatus::Ok,
            user_paused: false,
            cancel: Cancel::No,
            group: None,
            started: false,
            end: End::Open,
            hidden: false,
        }
    }

    /// Whether the work has begun and not ended.
    pub(super) fn is_at_work(&self) -> bool {
        use JobStatus as S;
        matches!(self.status, S::Running | S::Paused | S::Ready | S::Standby)
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.status, JobStatus::Ready | JobStatus::Standby)
    }

    pub(super) fn become_(&mut self, to: JobStatus, sink: &mut Sink) -> Result<(), StateError> {
        if !state::may_become(self.status, to) {
            let (id, from) = (self.id.clone(), self.status);
            return Err(StateError::Transition { id, from, to });
        }
        self.status = to;
        self.tell(&Event::JobStatusChange { id: self.id.clone(), status: to }, sink);
        Ok(())
    }

    pub(super) fn tell(&self, event: &Event, sink: &mut Sink) {
        if !self.hidden {
            sink(event);
        }
    }

    /// Ready, once the work is: with BLOCK_JOB_READY.
    pub(super) fn become_ready(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        self.become_(JobStatus::Ready, sink)?;
        if is_block(self.kind) {
            let (offset, len) = self.numbers();
            let (kind, device, speed) = (self.kind, self.id.clone(), self.speed);
            self.tell(&Event::BlockJobReady { kind, device, len, offset, speed }, sink);
        }
        Ok(())
    }

    /// Pending, once all of the group wait: with BLOCK_JOB_PENDING if a client is to finalize it.
    pub(super) fn become_pending(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        self.become_(JobStatus::Pending, sink)?;
        if is_block(self.kind) && !self.auto.finalize {
            self.tell(&Event::BlockJobPending { kind: self.kind, id: self.id.clone() }, sink);
        }
        Ok(())
    }

    pub(super) fn unpause(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        self.user_paused = false;
        match self.status {
            JobStatus::Paused => self.become_(JobStatus::Running, sink),
            JobStatus::Standby => self.become_(JobStatus::Ready, sink),
            _ => Ok(()),
        }
    }

    /// What the work waits for is over: a pause, or an error that it stopped at.
    pub(super) fn resume(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        if self.user_paused {
            self.io_status = BlockDeviceIoStatus::Ok;
            if let Some(work) = &mut self.work {
                work.resume();
            }
        }
        self.unpause(sink)
    }

    /// Aborting, for the first reason that is given.
    pub(super) fn fail(&mut self, error: String, sink: &mut Sink) -> Result<(), StateError> {
        self.unpause(sink)?;
        self.become_(JobStatus::Aborting, sink)?;
        self.error.get_or_insert(error);
        Ok(())
    }

    /// The end: the work goes, its events are told, and the job too if it is to.
    pub(super) fn conclude(&mut self, sink: &mut Sink) -> Result<(), StateError> {
        if let Some(work) = self.work.take() {
            self.progress = work.progress();
            self.report = work.report();
        }
        if !is_block(self.kind) && self.status != JobStatus::Aborting {
            // Also without anything to count: clients divide by the total.
            let all = self.progress.0.max(self.progress.1).max(1);
            self.progress = (all, all);
        }
        self.group = None;
        if is_block(self.kind) && self.started {
            self.tell(&self.end_event(), sink);
        }
        self.become_(JobStatus::Concluded, sink)?;
        if self.auto.dismiss { self.become_(JobStatus::Null, sink) } else { Ok(()) }
    }

    fn end_event(&self) -> Event {
        let (offset, len) = self.numbers();
        let (kind, device, speed) = (self.kind, self.id.clone(), self.speed);
        if self.status == JobStatus::Aborting && self.cancel == Cancel::Force {
            return Event::BlockJobCancelled { kind, device, len, offset, speed };
        }
        let error = self.error.clone();
        Event::BlockJobCompleted { kind, device, len, offset, speed, error }
    }

    pub(super) fn refusal(&self, verb: JobVerb) -> Error {
        Error::job_verb(&self.id, self.status.as_str(), verb.as_str())
    }

    /// Done so far, and the sum. Jobs that are not about blocks count from 0 of 1, as QEMU's, until they know
    /// their sum: clients divide by it.
    fn numbers(&self) -> (i64, i64) {
        let (current, total) = self.work.as_ref().map_or(self.progress, |work| work.progress());
        let total = if is_block(self.kind) { total } else { total.max(1) };
        let clamp = |number| i64::try_from(number).unwrap_or(i64::MAX);
        (clamp(current), clamp(total))
    }

    pub(super) fn info(&self) -> JobInfo {
        let (current_progress, total_progress) = self.numbers();
        let report = self.report();
        JobInfo {
            id: self.id.clone(),
            kind: self.kind,
            status: self.status,
            current_progress,
            total_progress,
            error: self.error.clone(),
            pause_ns: report.longest_pause,
            bytes_written: report.written,
            incremental: report.incremental,
        }
    }

    fn report(&self) -> WorkReport {
        self.work.as_ref().map_or(self.report, |work| work.report())
    }

    pub(super) fn block_info(&self) -> BlockJobInfo {
        let (offset, len) = self.numbers();
        let resting = matches!(self.status, JobStatus::Paused | JobStatus::Standby);
        BlockJobInfo {
            kind: self.kind,
            device: self.id.clone(),
            len,
            offset,
            busy: self.is_at_work() && !resting,
            paused: self.user_paused,
            speed: self.speed,
            io_status: self.io_status,
            ready: self.is_ready(),
            status: self.status,
            auto_finalize: self.auto.finalize,
            auto_dismiss: self.auto.dismiss,
            error: self.error.clone(),
            actively_synced: self.report().synced,
        }
    }
}
