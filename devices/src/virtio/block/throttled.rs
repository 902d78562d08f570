//! Requests of a disk that wait because it has limits: block_set_io_throttle. See `docs/devices.md`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::block::throttle::ThrottleGroup;

/// Numbers of disks within groups.
static NEXT_MEMBER: AtomicU64 = AtomicU64::new(0);

/// The limits of a disk, shared by its thread and the machine.
#[derive(Debug)]
pub struct IoThrottle {
    member: u64,
    /// Whether there is a group: most disks have none, and need no lock to see it.
    limited: AtomicBool,
    group: Mutex<Option<Arc<ThrottleGroup>>>,
}

impl Default for IoThrottle {
    fn default() -> Self {
        Self {
            member: NEXT_MEMBER.fetch_add(1, Ordering::Relaxed),
            limited: AtomicBool::new(false),
            group: Mutex::new(None),
        }
    }
}

impl IoThrottle {
    /// The group with the limits, if there are any.
    pub fn group(&self) -> Option<Arc<ThrottleGroup>> {
        self.lock().clone()
    }

    /// Joins a group, or leaves the one it is in. The disk must be told to look again.
    pub fn set_group(&self, group: Option<Arc<ThrottleGroup>>) {
        let limited = group.is_some();
        let former = std::mem::replace(&mut *self.lock(), group);
        self.limited.store(limited, Ordering::Release);
        if let Some(former) = former {
            former.leave(self.member);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<ThrottleGroup>>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// With the lock held, or the disk could get in line of a group that it has just left, and stay
    /// there, with the others behind it for ever.
    fn begin(&self, write: bool, bytes: u64, more: bool) -> Result<(), Duration> {
        match &*self.lock() {
            Some(group) => group.begin(self.member, write, bytes, more),
            None => Ok(()),
        }
    }

    fn begin_now(&self, write: bool, bytes: u64) {
        if let Some(group) = &*self.lock() {
            group.begin_now(self.member, write, bytes);
        }
    }
}

/// What waits, of one disk.
#[derive(Debug)]
pub(super) struct Throttled<T> {
    throttle: Arc<IoThrottle>,
    /// Reads and writes, each in the order in which they came, with their bytes.
    lines: [VecDeque<(T, u64)>; 2],
    /// When each is to be tried again.
    due: [Option<Instant>; 2],
}

impl<T> Throttled<T> {
    pub(super) fn new(throttle: Arc<IoThrottle>) -> Self {
        Self { throttle, lines: [VecDeque::new(), VecDeque::new()], due: [None; 2] }
    }

    /// A read or write comes; gives it back if it may begin.
    pub(super) fn admit(&mut self, request: T, write: bool, bytes: u64) -> Option<T> {
        let index = usize::from(write);
        if self.lines[index].is_empty() {
            if !self.throttle.is_limited() {
                return Some(request);
            }
            match self.throttle.begin(write, bytes, false) {
                Ok(()) => return Some(request),
                Err(wait) => self.due[index] = Instant::now().checked_add(wait),
            }
        }
        self.lines[index].push_back((request, bytes));
        None
    }

    /// Those that may begin now.
    pub(super) fn ready(&mut self) -> Vec<T> {
        let mut ready = Vec::new();
        for (index, line) in self.lines.iter_mut().enumerate() {
            self.due[index] = None;
            while let Some((_, bytes)) = line.front() {
                match self.throttle.begin(index == 1, *bytes, line.len() > 1) {
                    Ok(()) => ready.extend(line.pop_front().map(|(request, _)| request)),
                    Err(wait) => {
                        self.due[index] = Instant::now().checked_add(wait);
                        break;
                    }
                }
            }
        }
        ready
    }

    /// All of them: the disk is to come to rest, and that waits for no bucket.
    pub(super) fn all(&mut self) -> Vec<T> {
        self.due = [None; 2];
        let mut all = Vec::new();
        for (index, line) in self.lines.iter_mut().enumerate() {
            for (request, bytes) in line.drain(..) {
                self.throttle.begin_now(index == 1, bytes);
                all.push(request);
            }
        }
        all
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.lines.iter().map(VecDeque::len).sum()
    }

    /// How long until some may begin; `None` if none waits for time to pass.
    pub(super) fn wait(&self) -> Option<Duration> {
        let due = self.due.iter().flatten().min()?;
        Some(due.saturating_duration_since(Instant::now()))
    }
}

#[cfg(test)]
mod tests {
    use ::block::throttle::{Kind, Limits, Rate};

    use super::*;

    /// One byte a second.
    fn slow() -> Limits {
        let bytes = Kind { total: Rate::steady(1), ..Kind::default() };
        Limits { bytes, ..Limits::default() }
    }

    #[test]
    fn a_disk_that_leaves_its_group_while_it_asks_is_in_nobodys_way() {
        let throttle = Arc::new(IoThrottle::default());
        let (leaving, hour) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let left = Arc::new(Mutex::new(None));
        let clock = {
            let (throttle, leaving, hour) = (throttle.clone(), leaving.clone(), hour.clone());
            let left = left.clone();
            move || {
                if leaving.swap(false, Ordering::Relaxed) {
                    // Another thread takes the disk out of the group, now or as soon as it can.
                    let other = throttle.clone();
                    let thread = std::thread::spawn(move || other.set_group(None));
                    while !thread.is_finished() && throttle.group.try_lock().is_ok() {
                        std::thread::yield_now();
                    }
                    *left.lock().unwrap() = Some(thread);
                }
                Duration::from_secs(3600 * hour.load(Ordering::Relaxed))
            }
        };
        let group = Arc::new(ThrottleGroup::new("g", slow(), Box::new(clock)));
        throttle.set_group(Some(group.clone()));
        assert_eq!(throttle.begin(true, 1000, false), Ok(()));
        leaving.store(true, Ordering::Relaxed);
        // Asked of the group that it leaves: it has to wait.
        throttle.begin(true, 1, false).unwrap_err();
        left.lock().unwrap().take().unwrap().join().unwrap();
        hour.store(1, Ordering::Relaxed);
        assert_eq!(group.begin(throttle.member + 1, true, 1, false), Ok(()));
    }
}
