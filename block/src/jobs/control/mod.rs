//! What a long operation and those who watch it tell each other.
//!
//! The operation calls [`Control::rest`] and [`Control::throttle`] between pieces of work, with
//! nothing of a piece under way, and so is told to pause, to end and how fast to go. All other methods
//! return at once and may be called by any thread, also by one that holds locks which the
//! observer takes: the observer is called with none of these locks held.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::throttle::{Bucket, Rate};
use crate::{Error, Progress, Result};

mod outcome;

pub use outcome::{Action, Finish, IoStatus, Notice, OnError, Side, Wake};

/// How long a piece that failed waits before it is tried again, where errors are ignored.
const RETRY: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct State {
    /// Somebody asked for a pause, or an error did.
    pause: bool,
    /// The operation rests.
    paused: bool,
    /// The operation waits for something to do.
    idle: bool,
    cancelled: bool,
    /// How often it was resumed.
    resumed: u64,
    ready: bool,
    finish: Option<Finish>,
    io_status: IoStatus,
    speed: Bucket,
}

type Observer = Arc<dyn Fn(Notice) + Send + Sync>;

/// Between one operation and those who watch it. See the module. Clones are one control.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    progress: Progress,
    state: Mutex<State>,
    changed: Condvar,
    observer: Observer,
    start: Instant,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("state", &self.0.state).finish_non_exhaustive()
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new(|_| {})
    }
}

/// For those who watch.
impl Control {
    /// For one operation. `observer` is called by its thread, with no lock held.
    pub fn new(observer: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        let observer: Observer = Arc::new(observer);
        let paused = Arc::clone(&observer);
        Self(Arc::new(Shared {
            progress: Progress::watched(move || paused(Notice::Paused)),
            state: Mutex::default(),
            changed: Condvar::new(),
            observer,
            start: Instant::now(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.0.start.elapsed()
    }

    /// Changes the state and has the operation look at it.
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.0.changed.notify_all();
    }

    /// Bytes done, and the expected sum. Both only grow.
    pub fn progress(&self) -> (u64, u64) {
        let (current, total) = self.0.progress.get();
        (current, total.max(current))
    }

    /// Ends the operation. Without `force`, one that is ready succeeds with its copy as it is and the
    /// source in its place ([`Finish::Leave`]).
    pub fn cancel(&self, force: bool) {
        self.change(|state| {
            if state.ready && !force {
                state.finish = Some(Finish::Leave);
            } else {
                state.cancelled = true;
                self.0.progress.cancel();
            }
        });
    }

    /// Asks the operation to rest; [`Notice::Paused`] tells that it does.
    pub fn pause(&self) {
        self.change(|state| state.pause = true);
        self.0.progress.pause();
    }

    /// Lets it go on. What failed before is forgotten.
    pub fn resume(&self) {
        self.change(|state| {
            state.pause = false;
            state.resumed += 1;
            state.io_status = IoStatus::Ok;
        });
        self.0.progress.resume();
    }

    /// Asks an operation that is ready to complete, once it is not paused.
    pub fn complete(&self) {
        self.change(|state| state.finish = Some(Finish::Complete));
    }

    /// Bytes per second that the operation may copy on its own; 0 for no limit.
    pub fn set_speed(&self, speed: u64) {
        let now = self.now();
        self.change(|state| state.speed.set_rate(Rate::steady(speed), now));
    }

    /// See [`Control::set_speed`].
    pub fn speed(&self) -> u64 {
        self.state().speed.rate().average
    }

    /// Whether the last failure still stops the operation.
    pub fn io_status(&self) -> IoStatus {
        self.state().io_status
    }

    /// Whether the operation is neither paused nor waiting for something to do.
    pub fn busy(&self) -> bool {
        let state = self.state();
        !state.paused && !state.idle
    }

    /// Whether [`Notice::Ready`] was told.
    pub fn is_ready(&self) -> bool {
        self.state().ready
    }
}

/// For the operation.
impl Control {
    /// Adds bytes to do.
    pub fn add_total(&self, bytes: u64) {
        self.0.progress.add_total(bytes);
    }

    /// Adds bytes done.
    pub fn advance(&self, bytes: u64) {
        self.0.progress.advance(bytes);
    }

    /// Says that so many bytes are still to do: the sum grows if they are more than was expected.
    pub(crate) fn set_remaining(&self, bytes: u64) {
        let (current, total) = self.0.progress.get();
        self.0.progress.add_total((current + bytes).saturating_sub(total));
    }

    /// Says that all is done.
    pub(crate) fn caught_up(&self) {
        let (current, total) = self.0.progress.get();
        self.0.progress.advance(total.saturating_sub(current));
    }

    /// For steps that know nothing but progress, pauses and the end.
    pub fn steps(&self) -> &Progress {
        &self.0.progress
    }

    /// Rests while it is to be paused.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once it is to end.
    pub fn rest(&self) -> Result<()> {
        let mut state = self.state();
        while state.pause && !state.cancelled {
            state.paused = true;
            let resumed = state.resumed;
            drop(state);
            (self.0.observer)(Notice::Paused);
            // A pause that follows a resume at once is another one, and told again.
            let resting =
                |state: &mut State| state.pause && !state.cancelled && state.resumed == resumed;
            let changed = self.0.changed.wait_while(self.state(), resting);
            state = changed.unwrap_or_else(PoisonError::into_inner);
            state.paused = false;
        }
        if state.cancelled { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits until `bytes` more may be copied at the speed that is set, resting where it is to.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once it is to end.
    pub fn throttle(&self, bytes: u64) -> Result<()> {
        while !self.pace(bytes) {
            self.rest()?;
        }
        Ok(())
    }

    /// Notes that `bytes` are copied, for the speed that is set.
    pub(crate) fn spend(&self, bytes: u64) {
        self.state().speed.take(bytes);
    }

    /// Says whether `bytes` more may be copied now; else a pause or the end was asked for: call
    /// [`Control::rest`] once nothing is under way. Waits for the speed that is set: with nothing in hand
    /// that others may wait for.
    pub(crate) fn pace(&self, bytes: u64) -> bool {
        loop {
            let mut state = self.state();
            if state.pause || state.cancelled {
                return false;
            }
            let wait = state.speed.wait(self.now());
            if wait.is_zero() {
                state.speed.take(bytes);
                return true;
            }
            self.wait_for(state, wait, |_| false);
        }
    }

    /// Waits until `until`, the end of a pause in work, a pause or the end.
    fn wait_for(
        &self,
        state: MutexGuard<'_, State>,
        time: Duration,
        until: impl Fn(&State) -> bool,
    ) {
        let rate = state.speed.rate();
        let same = |state: &mut State| {
            !state.pause && !state.cancelled && state.speed.rate() == rate && !until(state)
        };
        drop(self.0.changed.wait_timeout_while(state, time, same));
    }

    /// Tells that source and target are the same.
    pub fn ready(&self) {
        if !std::mem::replace(&mut self.state().ready, true) {
            (self.0.observer)(Notice::Ready);
        }
    }

    /// How the operation is to end, if that was said.
    pub fn finish(&self) -> Option<Finish> {
        self.state().finish
    }

    /// Waits until there is work, as `work` tells, or the operation is to end, resting where it is to.
    /// Whoever makes work calls [`Control::wake`].
    ///
    /// # Errors
    /// [`Error::Cancelled`] once it is to end at once.
    pub fn idle(&self, work: impl Fn() -> bool) -> Result<Wake> {
        loop {
            self.rest()?;
            let mut state = self.state();
            state.idle = true;
            // `work` is looked at with the lock held, which `wake` takes: none is missed.
            let quiet = |state: &mut State| {
                !state.pause && !state.cancelled && state.finish.is_none() && !work()
            };
            state = self.0.changed.wait_while(state, quiet).unwrap_or_else(PoisonError::into_inner);
            state.idle = false;
            if state.pause || state.cancelled {
                continue;
            }
            return Ok(state.finish.map_or(Wake::Work, Wake::Finish));
        }
    }

    /// Has [`Control::idle`] look again.
    pub fn wake(&self) {
        self.change(|_| {});
    }

    /// Does about a failed piece what `policy` says, with nothing under way: returns when it is to be
    /// tried again.
    ///
    /// # Errors
    /// `error` where it is to be reported; [`Error::Cancelled`] if the operation was ended meanwhile.
    pub fn failed(&self, policy: OnError, side: Side, error: Error) -> Result<()> {
        let nospace = error.errno() == libc::ENOSPC;
        let action = match policy {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if nospace => Action::Stop,
            OnError::Enospc => Action::Report,
        };
        if action == Action::Stop {
            let io_status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
            let mut state = self.state();
            // Before it is told: whoever hears of it may resume at once.
            (state.pause, state.io_status) = (true, io_status);
        }
        (self.0.observer)(Notice::Error { read: side == Side::Source, action, nospace });
        match action {
            Action::Report => return Err(error),
            Action::Stop => {}
            Action::Ignore => {
                tracing::debug!("ignored, and tried again: {error}");
                self.wait_for(self.state(), RETRY, |_| false);
            }
        }
        self.rest()
    }
}

#[cfg(test)]
mod tests;
