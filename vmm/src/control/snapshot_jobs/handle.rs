//! What is known of one job.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use block::Progress;
use qmp::jobs::{Work, WorkReport};

use crate::blocks::jobs::JobList;

/// What the job list and the main thread know of a job's work.
#[derive(Clone)]
pub(in crate::control) struct Handle {
    pub(in crate::control) progress: Arc<Progress>,
    /// Set when a cancel would leave the guest without its memory.
    pub(in crate::control) committed: Arc<AtomicBool>,
    pub(in crate::control) memory_lost: Arc<AtomicBool>,
    pub(super) report: Arc<Mutex<WorkReport>>,
    /// Who waits for the end, where the job is not in the list.
    pub(super) asker: Option<Arc<Mutex<Option<Asker>>>>,
    /// Whoever is answered when the job is over, or before.
    pub(super) answer: Arc<Mutex<Option<qmp::Reply>>>,
}

/// A line of the monitor that is done by what jobs do, with its tag. It names no disks: those of the
/// machine are looked for when its turn comes, as a job before it may have put others in their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) enum Line {
    /// `savevm`
    Save(String),
    /// `loadvm`
    Load(String),
    /// `delvm`
    Delete(String),
}

/// Who waits for the end of a line.
pub(in crate::control) struct Asker {
    /// Where the text goes.
    pub(in crate::control) reply: qmp::Reply,
    /// What is done after what is done now, if that succeeds.
    pub(in crate::control) then: Option<Line>,
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
    pub(super) fn take_asker(&self) -> Option<Asker> {
        let asker = self.asker.as_ref()?;
        asker.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What is done after this for who waits for the line.
    pub(super) fn set_then(&self, then: Option<Line>) {
        if let Some(asker) = &self.asker
            && let Some(asker) = &mut *asker.lock().unwrap_or_else(PoisonError::into_inner)
        {
            asker.then = then;
        }
    }

    pub(super) fn new(list: JobList, id: String, answer: Option<qmp::Reply>) -> Self {
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
    pub(in crate::control) fn unlisted(list: JobList) -> Self {
        Self::new(list, String::new(), None)
    }

    /// Whoever is still to be answered.
    pub(super) fn take_answer(&self) -> Option<qmp::Reply> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the list still has the job. To be asked with the list's lock held.
    pub(super) fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.progress) > 1
    }
}
