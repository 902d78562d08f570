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

/// What is done about a failed read or write: QMP's `BlockdevOnError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The operation fails.
    #[default]
    Report,
    /// The piece is tried again.
    Ignore,
    /// The operation rests, and tries again when it is resumed.
    Stop,
    /// As `Stop` where space ran out, else as `Report`.
    Enospc,
}

/// What was done about it: QMP's `BlockErrorAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The operation fails.
    Report,
    /// The piece is tried again.
    Ignore,
    /// The operation rests.
    Stop,
}

/// Which side of a copy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What is read.
    Source,
    /// What is written.
    Target,
}

/// What watchers are told, by the operation's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// It rests after [`Control::pause`] and does nothing until [`Control::resume`].
    Paused,
    /// Source and target are the same, and are kept so until [`Control::complete`].
    Ready,
    /// A read or write failed. After [`Action::Stop`] it rests as if paused.
    Error {
        /// Whether it was a read.
        read: bool,
        /// What is done about it.
        action: Action,
        /// Whether space ran out.
        nospace: bool,
    },
}

/// The last failure that stopped the operation: QMP's `BlockDeviceIoStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// None, or it was resumed since.
    #[default]
    Ok,
    /// Space ran out.
    NoSpace,
    /// Anything else.
    Failed,
}

/// How an operation that is ready is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// Its outcome takes effect: the target takes the source's place.
    Complete,
    /// The copy is left as it is at that moment, and the source in its place.
    Leave,
}

/// Why [`Control::idle`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// There is work.
    Work,
    /// It is to end.
    Finish(Finish),
}

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

/// Between one operation and those who watch it. See the module.
pub struct Control {
    progress: Progress,
    state: Mutex<State>,
    changed: Condvar,
    observer: Observer,
    start: Instant,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("state", &self.state).finish_non_exhaustive()
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
        Self {
            progress: Progress::watched(move || paused(Notice::Paused)),
            state: Mutex::default(),
            changed: Condvar::new(),
            observer,
            start: Instant::now(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Changes the state and has the operation look at it.
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    /// Bytes done, and the expected sum. Both only grow.
    pub fn progress(&self) -> (u64, u64) {
        self.progress.get()
    }

    /// Ends the operation. Without `force`, one that is ready succeeds with its copy as it is and the
    /// source in its place ([`Finish::Leave`]).
    pub fn cancel(&self, force: bool) {
        self.change(|state| {
            if state.ready && !force {
                state.finish = Some(Finish::Leave);
            } else {
                state.cancelled = true;
                self.progress.cancel();
            }
        });
    }

    /// Asks the operation to rest; [`Notice::Paused`] tells that it does.
    pub fn pause(&self) {
        self.change(|state| state.pause = true);
        self.progress.pause();
    }

    /// Lets it go on. What failed before is forgotten.
    pub fn resume(&self) {
        self.change(|state| {
            state.pause = false;
            state.resumed += 1;
            state.io_status = IoStatus::Ok;
        });
        self.progress.resume();
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
        self.progress.add_total(bytes);
    }

    /// Adds bytes done.
    pub fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }

    /// Says that so many bytes are still to do: the sum grows if they are more than was expected.
    pub fn set_remaining(&self, bytes: u64) {
        let (current, total) = self.progress.get();
        self.progress.add_total((current + bytes).saturating_sub(total));
    }

    /// Says that all is done.
    pub fn caught_up(&self) {
        let (current, total) = self.progress.get();
        self.progress.advance(total.saturating_sub(current));
    }

    /// For steps that know nothing but progress, pauses and the end.
    pub fn steps(&self) -> &Progress {
        &self.progress
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
            (self.observer)(Notice::Paused);
            // A pause that follows a resume at once is another one, and told again.
            let resting =
                |state: &mut State| state.pause && !state.cancelled && state.resumed == resumed;
            let changed = self.changed.wait_while(self.state(), resting);
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
        loop {
            self.rest()?;
            let mut state = self.state();
            let wait = state.speed.wait(self.now());
            if wait.is_zero() {
                state.speed.take(bytes);
                return Ok(());
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
        drop(self.changed.wait_timeout_while(state, time, same));
    }

    /// Tells that source and target are the same.
    pub fn ready(&self) {
        if !std::mem::replace(&mut self.state().ready, true) {
            (self.observer)(Notice::Ready);
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
            state = self.changed.wait_while(state, quiet).unwrap_or_else(PoisonError::into_inner);
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

    /// Whether somebody waits in [`Control::idle`].
    pub fn is_idle(&self) -> bool {
        self.state().idle
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
        (self.observer)(Notice::Error { read: side == Side::Source, action, nospace });
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
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use super::*;

    fn control() -> (Arc<Control>, Receiver<Notice>) {
        let (tell, told) = channel();
        let tell = Mutex::new(tell);
        let control = Control::new(move |notice| tell.lock().unwrap().send(notice).unwrap());
        (Arc::new(control), told)
    }

    fn io_error(errno: i32) -> Error {
        let source = std::io::Error::from_raw_os_error(errno);
        Error::Io { operation: "write", filename: "f".to_owned(), offset: 0, source }
    }

    #[test]
    fn a_paused_operation_rests_until_it_is_resumed() {
        let (control, told) = control();
        control.rest().unwrap();
        control.pause();
        thread::scope(|scope| {
            let operation = scope.spawn(|| control.rest());
            assert_eq!(told.recv().unwrap(), Notice::Paused);
            assert!(!control.busy() && !operation.is_finished());
            control.resume();
            operation.join().unwrap().unwrap();
        });
        assert!(control.busy());
    }

    #[test]
    fn a_pause_right_after_a_resume_is_told_again() {
        let (control, told) = control();
        control.pause();
        thread::scope(|scope| {
            let operation = scope.spawn(|| {
                loop {
                    control.rest()?;
                    thread::yield_now();
                }
            });
            for _ in 0..100 {
                assert_eq!(told.recv().unwrap(), Notice::Paused);
                control.resume();
                control.pause();
            }
            control.cancel(true);
            let ended: Result<()> = operation.join().unwrap();
            assert!(matches!(ended, Err(Error::Cancelled)));
        });
    }

    #[test]
    fn a_cancelled_operation_ends_where_it_rests_waits_or_idles() {
        type Wait = fn(&Control) -> Result<()>;
        let waits: [Wait; 4] = [
            |control| {
                control.pause();
                control.rest()
            },
            |control| {
                control.set_speed(1);
                control.throttle(1 << 40)?;
                control.throttle(1)
            },
            |control| control.idle(|| false).map(drop),
            |control| control.failed(OnError::Stop, Side::Target, io_error(libc::EIO)),
        ];
        for wait in waits {
            let (control, _told) = control();
            thread::scope(|scope| {
                let operation = scope.spawn(|| wait(&control));
                control.cancel(false);
                assert!(matches!(operation.join().unwrap(), Err(Error::Cancelled)));
            });
            control.steps().check().unwrap_err();
        }
    }

    #[test]
    fn a_speed_that_is_lifted_lets_the_operation_go_on() {
        let (control, _told) = control();
        control.set_speed(1);
        assert_eq!(control.speed(), 1);
        control.throttle(1 << 40).unwrap();
        thread::scope(|scope| {
            let operation = scope.spawn(|| control.throttle(1));
            control.set_speed(0);
            operation.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_pause_and_its_end_are_heeded_while_waiting_for_the_speed() {
        let (control, told) = control();
        control.set_speed(1);
        control.throttle(1 << 40).unwrap();
        thread::scope(|scope| {
            let operation = scope.spawn(|| control.throttle(1));
            control.pause();
            assert_eq!(told.recv().unwrap(), Notice::Paused);
            control.set_speed(0);
            control.resume();
            operation.join().unwrap().unwrap();
        });
    }

    #[test]
    fn an_idle_operation_is_woken_by_work_and_by_its_end_but_not_while_paused() {
        let (control, told) = control();
        let work = std::sync::atomic::AtomicBool::new(false);
        let look = || work.load(std::sync::atomic::Ordering::Relaxed);
        thread::scope(|scope| {
            let operation = scope.spawn(|| control.idle(look));
            work.store(true, std::sync::atomic::Ordering::Relaxed);
            control.wake();
            assert_eq!(operation.join().unwrap().unwrap(), Wake::Work);
        });
        work.store(false, std::sync::atomic::Ordering::Relaxed);
        control.pause();
        thread::scope(|scope| {
            let operation = scope.spawn(|| control.idle(look));
            assert_eq!(told.recv().unwrap(), Notice::Paused);
            control.complete();
            assert!(!operation.is_finished());
            control.resume();
            assert_eq!(operation.join().unwrap().unwrap(), Wake::Finish(Finish::Complete));
        });
    }

    #[test]
    fn cancelling_a_ready_operation_leaves_its_copy_unless_forced() {
        let (control, told) = control();
        control.ready();
        control.ready();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [Notice::Ready]);
        control.cancel(false);
        assert_eq!(control.idle(|| false).unwrap(), Wake::Finish(Finish::Leave));
        control.cancel(true);
        assert!(matches!(control.rest(), Err(Error::Cancelled)));
    }

    #[test]
    fn errors_are_reported_ignored_or_stop_the_operation() {
        let (control, told) = control();
        let failed = |policy, errno| control.failed(policy, Side::Target, io_error(errno));
        let error = |action, nospace| Notice::Error { read: false, action, nospace };
        failed(OnError::Report, libc::EIO).unwrap_err();
        assert_eq!(told.recv().unwrap(), error(Action::Report, false));
        failed(OnError::Enospc, libc::EIO).unwrap_err();
        assert_eq!(told.recv().unwrap(), error(Action::Report, false));
        failed(OnError::Ignore, libc::EIO).unwrap();
        assert_eq!(told.recv().unwrap(), error(Action::Ignore, false));
        for (errno, io_status) in [(libc::ENOSPC, IoStatus::NoSpace), (libc::EIO, IoStatus::Failed)]
        {
            let policy = if errno == libc::EIO { OnError::Stop } else { OnError::Enospc };
            thread::scope(|scope| {
                let operation = scope.spawn(|| failed(policy, errno));
                assert_eq!(told.recv().unwrap(), error(Action::Stop, errno == libc::ENOSPC));
                assert_eq!(told.recv().unwrap(), Notice::Paused);
                assert_eq!(control.io_status(), io_status);
                control.resume();
                operation.join().unwrap().unwrap();
            });
            assert_eq!(control.io_status(), IoStatus::Ok);
        }
    }

    #[test]
    fn progress_only_grows() {
        let control = Control::default();
        control.add_total(100);
        control.advance(60);
        control.set_remaining(30);
        assert_eq!(control.progress(), (60, 100));
        control.set_remaining(70);
        assert_eq!(control.progress(), (60, 130));
        control.caught_up();
        control.caught_up();
        assert_eq!(control.progress(), (130, 130));
    }
}
