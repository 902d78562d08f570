//! Buckets that several disks share.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Limits, Throttle};

/// A clock that never goes back, from any fixed moment.
pub type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// How soon a disk looks again whose turn it is not while there is room: whose turn it is looks now.
const TURN: Duration = Duration::from_millis(1);

/// Disks that share limits take turns: while several wait, each does one request when it is the first
/// in line, and goes to the end of it.
pub struct ThrottleGroup {
    name: String,
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    throttle: Throttle,
    /// Members with reads that wait, and with writes, the next one first.
    lines: [VecDeque<u64>; 2],
}

impl fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("ThrottleGroup").field("name", &self.name).field("state", &*state).finish()
    }
}

/// A clock of the host.
pub fn monotonic() -> Clock {
    let start = Instant::now();
    Box::new(move || start.elapsed())
}

impl ThrottleGroup {
    /// A group that has done nothing yet.
    pub fn new(name: &str, limits: Limits, clock: Clock) -> Self {
        let state = State { throttle: Throttle::new(limits), lines: Default::default() };
        Self { name: name.to_owned(), clock, state: Mutex::new(state) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it keeps to.
    pub fn limits(&self) -> Limits {
        *self.lock().throttle.limits()
    }

    /// Other limits, with what was done so far forgotten. Who waits must be told to look again.
    pub fn set_limits(&self, limits: Limits) {
        self.lock().throttle = Throttle::new(limits);
    }

    /// Begins a read or write of a member, or says how long it has to wait before it asks again. A
    /// member asks for its oldest read, and for its oldest write. `more` says that it has another to
    /// ask for next.
    ///
    /// # Errors
    /// The time to wait.
    pub fn begin(&self, member: u64, write: bool, bytes: u64, more: bool) -> Result<(), Duration> {
        let now = (self.clock)();
        let mut state = self.lock();
        let State { throttle, lines } = &mut *state;
        let line = &mut lines[usize::from(write)];
        let wait = throttle.wait(now, write);
        let first = line.front().is_none_or(|&first| first == member);
        if wait.is_zero() && first {
            line.retain(|&waiting| waiting != member);
            if more {
                line.push_back(member);
            }
            throttle.take(bytes, write);
            return Ok(());
        }
        if !line.contains(&member) {
            line.push_back(member);
        }
        Err(wait.max(TURN))
    }

    /// Begins a read or write of a member that cannot wait: it counts all the same.
    pub fn begin_now(&self, member: u64, write: bool, bytes: u64) {
        let now = (self.clock)();
        let mut state = self.lock();
        state.lines[usize::from(write)].retain(|&waiting| waiting != member);
        // Time up to now leaks first.
        let _ = state.throttle.wait(now, write);
        state.throttle.take(bytes, write);
    }

    /// A member waits for nothing any more.
    pub fn leave(&self, member: u64) {
        self.lock().lines.iter_mut().for_each(|line| line.retain(|&waiting| waiting != member));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::{Kind, Rate};
    use super::*;

    /// A group of so many bytes a second, and its clock in milliseconds.
    fn group(bytes: u64) -> (ThrottleGroup, Arc<AtomicU64>) {
        let time = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&time);
        let clock = Box::new(move || Duration::from_millis(clock.load(Ordering::Relaxed)));
        let kind = Kind { total: Rate::steady(bytes), ..Kind::default() };
        (ThrottleGroup::new("g", Limits { bytes: kind, ..Limits::default() }, clock), time)
    }

    #[test]
    fn members_that_wait_take_turns() {
        let (group, time) = group(1000);
        // Nothing is waited for: both the first and, with room for 100 bytes, the second.
        assert_eq!(group.begin(1, true, 100, false), Ok(()));
        assert_eq!(group.begin(2, true, 100, false), Ok(()));
        let mut done = Vec::new();
        for now in (0..1000).step_by(10) {
            time.store(now, Ordering::Relaxed);
            for member in [1, 2, 3] {
                if group.begin(member, true, 100, true).is_ok() {
                    done.push(member);
                }
            }
        }
        // 100 bytes each tenth of a second.
        assert!((8..=10).contains(&done.len()), "{done:?}");
        let turns: Vec<u64> = [1, 2, 3].into_iter().cycle().take(done.len()).collect();
        assert_eq!(done, turns);
    }

    #[test]
    fn one_that_leaves_is_not_waited_for() {
        let (group, time) = group(1000);
        assert_eq!(group.begin(1, true, 1000, false), Ok(()));
        assert_eq!(group.begin(1, true, 1, false), Err(Duration::from_millis(900)));
        assert_eq!(group.begin(2, true, 1, false), Err(Duration::from_millis(900)));
        time.store(900, Ordering::Relaxed);
        assert_eq!(group.begin(2, true, 1, false), Err(TURN));
        // Writes wait for no reads.
        assert_eq!(group.begin(2, false, 0, false), Ok(()));
        group.leave(1);
        assert_eq!(group.begin(2, true, 1, false), Ok(()));
    }

    #[test]
    fn what_cannot_wait_is_paid_for_by_others() {
        let (group, _) = group(1000);
        group.begin_now(1, false, 600);
        assert_eq!(group.begin(2, true, 1, false), Err(Duration::from_millis(500)));
        group.set_limits(Limits::default());
        assert_eq!(group.begin(2, true, 1, false), Ok(()));
        assert!(!group.limits().any());
    }
}
