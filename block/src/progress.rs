//! How a long operation reports its progress, and learns that it shall pause or end.

use std::fmt::{self, Debug, Formatter};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::{Error, Result};

/// Shared between an operation and whoever watches it. Both counts are bytes and only grow.
#[derive(Default)]
pub struct Progress {
    current: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    /// As in `pause`: looked at often.
    pause_wanted: AtomicBool,
    pause: Mutex<Pause>,
    changed: Condvar,
    on_pause: Option<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct Pause {
    wanted: bool,
    /// How often it was resumed.
    resumed: u64,
    /// How many do something that is not to be interrupted.
    busy: usize,
}

impl Debug for Progress {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("current/total", &self.get()).finish_non_exhaustive()
    }
}

impl Progress {
    /// One that calls `on_pause` whenever the operation rests, from its thread and with no lock held;
    /// where several threads work, each may.
    pub fn watched(on_pause: impl Fn() + Send + Sync + 'static) -> Self {
        Self { on_pause: Some(Box::new(on_pause)), ..Self::default() }
    }

    /// Adds bytes done.
    pub fn advance(&self, bytes: u64) {
        self.current.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds bytes to do.
    pub fn add_total(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes done and bytes to do.
    pub fn get(&self) -> (u64, u64) {
        (self.current.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Asks the operation to end.
    pub fn cancel(&self) {
        self.change(|_| self.cancelled.store(true, Ordering::Release));
    }

    /// Asks the operation to rest, at its next [`Progress::check`].
    pub fn pause(&self) {
        self.change(|pause| pause.wanted = true);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.change(|pause| {
            pause.wanted = false;
            pause.resumed += 1;
        });
    }

    /// The operation does not rest until what this returns is dropped: somebody waits for it.
    pub fn without_pause(&self) -> Uninterrupted<'_> {
        self.change(|pause| pause.busy += 1);
        Uninterrupted(self)
    }

    /// Rests while it is to; `Err(Cancelled)` once [`Progress::cancel`] was called. Not to be called
    /// with locks held that others wait for.
    pub fn check(&self) -> Result<()> {
        if self.pause_wanted.load(Ordering::Acquire) {
            self.rest();
        }
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Whether [`Progress::cancel`] was called. Never rests.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    fn rest(&self) {
        let to_rest = |pause: &Pause| pause.wanted && pause.busy == 0 && !self.is_cancelled();
        let mut pause = self.lock();
        while to_rest(&pause) {
            let resumed = pause.resumed;
            drop(pause);
            if let Some(on_pause) = &self.on_pause {
                on_pause();
            }
            // A pause that follows a resume at once is another one, and told again.
            let same = |pause: &mut Pause| to_rest(pause) && pause.resumed == resumed;
            let changed = self.changed.wait_while(self.lock(), same);
            pause = changed.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Pause)) {
        let mut pause = self.lock();
        change(&mut pause);
        self.pause_wanted.store(pause.wanted, Ordering::Release);
        drop(pause);
        self.changed.notify_all();
    }
}

/// A part of an operation in which it does not rest; see [`Progress::without_pause`].
#[derive(Debug)]
pub struct Uninterrupted<'a>(&'a Progress);

impl Drop for Uninterrupted<'_> {
    fn drop(&mut self) {
        self.0.change(|pause| pause.busy -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_paused_operation_rests_at_a_check_until_it_is_resumed_or_cancelled() {
        let (tell, told) = channel();
        let progress = Progress::watched(move || tell.send(()).unwrap());
        progress.check().unwrap();
        progress.pause();
        thread::scope(|scope| {
            let operation = scope.spawn(|| progress.check());
            told.recv().unwrap();
            assert!(!operation.is_finished());
            progress.resume();
            operation.join().unwrap().unwrap();
            progress.pause();
            let operation = scope.spawn(|| progress.check());
            told.recv().unwrap();
            progress.cancel();
            assert!(matches!(operation.join().unwrap(), Err(Error::Cancelled)));
        });
    }

    #[test]
    fn what_is_not_to_be_interrupted_does_not_rest() {
        let (tell, told) = channel();
        let progress = Progress::watched(move || tell.send(()).unwrap());
        progress.pause();
        let uninterrupted = progress.without_pause();
        progress.check().unwrap();
        assert!(told.try_recv().is_err());
        drop(uninterrupted);
        thread::scope(|scope| {
            let operation = scope.spawn(|| progress.check());
            told.recv().unwrap();
            progress.resume();
            operation.join().unwrap().unwrap();
        });
    }
}
