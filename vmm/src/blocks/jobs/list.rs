//! The one list of jobs, shared by all threads.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use qmp::jobs::{Jobs, StateError};

/// All jobs: of blocks and of checkpoints. Clones are the same list.
///
/// Its lock is the last one that anybody takes, and is held for memory only: with it held, no other
/// lock is waited for but those in which a job's [`qmp::jobs::Work`] notes what it is asked.
#[derive(Clone)]
pub struct JobList {
    inner: Arc<Inner>,
}

struct Inner {
    jobs: Mutex<Jobs>,
    /// A job's thread has reported something.
    reported: Condvar,
}

impl JobList {
    /// An empty list; `events` hears of its changes.
    pub fn new(events: qmp::Events) -> Self {
        let jobs = Mutex::new(Jobs::new(move |event| events.emit(event)));
        Self { inner: Arc::new(Inner { jobs, reported: Condvar::new() }) }
    }

    /// The list, for a moment.
    pub fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a job's thread has to say. The list refuses only what a bug can bring about.
    pub fn report(&self, report: impl FnOnce(&mut Jobs) -> Result<(), StateError>) {
        let result = report(&mut self.lock());
        self.inner.reported.notify_all();
        if let Err(error) = result {
            tracing::error!("{error}");
        }
    }

    /// Cancels all jobs and waits until the last is gone. Those that wait for another thread than
    /// their own have to be gone before.
    pub fn finish(&self) {
        let mut jobs = self.lock();
        while jobs.close() > 0 {
            jobs = self.inner.reported.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
