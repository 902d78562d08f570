//! What a disk's requests come to, for `query-blockstats`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::request::Operation;

/// What a request does, as it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoKind {
    /// It reads.
    Read,
    /// It writes, zeroes too.
    Write,
    /// It makes writes durable.
    Flush,
    /// It gives space back.
    Unmap,
}

impl IoKind {
    /// What counts; the serial number does not.
    pub(super) fn of(operation: Operation) -> Option<Self> {
        match operation {
            Operation::Read(_) => Some(Self::Read),
            Operation::Write(_) | Operation::WriteZeroes => Some(Self::Write),
            Operation::Flush => Some(Self::Flush),
            Operation::Discard => Some(Self::Unmap),
            Operation::GetId | Operation::Unknown(_) => None,
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IoEnd {
    Done,
    Failed,
    /// It was not carried out, as it made no sense.
    Invalid,
}

/// Sums of one kind. Each is right by itself; a reader may see one request in some of them only.
#[derive(Debug, Default)]
struct Sums {
    operations: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

/// The same, read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoSums {
    /// Requests that succeeded.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long all requests took, failed ones too.
    pub nanoseconds: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that made no sense.
    pub invalid: u64,
}

/// The counters of a disk, shared by its queues. They count from the start of the program: neither a
/// reset nor a load takes anything back.
#[derive(Debug)]
pub struct IoCounters {
    sums: [Sums; 4],
    since: Instant,
    /// Nanoseconds after `since` of the last end of a request, plus one; 0 before the first.
    last: AtomicU64,
}

impl Default for IoCounters {
    fn default() -> Self {
        Self { sums: Default::default(), since: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl IoCounters {
    pub(super) fn count(&self, kind: IoKind, end: IoEnd, bytes: u64, started: Instant) {
        let sums = &self.sums[kind as usize];
        let add = |counter: &AtomicU64, amount| {
            counter.fetch_add(amount, Ordering::Relaxed);
        };
        match end {
            IoEnd::Done => {
                add(&sums.operations, 1);
                add(&sums.bytes, bytes);
            }
            IoEnd::Failed => add(&sums.failed, 1),
            IoEnd::Invalid => add(&sums.invalid, 1),
        }
        if end != IoEnd::Invalid {
            add(&sums.nanoseconds, nanoseconds(started));
        }
        self.last.store(nanoseconds(self.since).saturating_add(1), Ordering::Relaxed);
    }

    /// The sums of one kind.
    pub fn sums(&self, kind: IoKind) -> IoSums {
        let sums = &self.sums[kind as usize];
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IoSums {
            operations: get(&sums.operations),
            bytes: get(&sums.bytes),
            nanoseconds: get(&sums.nanoseconds),
            failed: get(&sums.failed),
            invalid: get(&sums.invalid),
        }
    }

    /// Nanoseconds since the last request ended; `None` if there was none.
    pub fn idle_nanoseconds(&self) -> Option<u64> {
        let last = self.last.load(Ordering::Relaxed).checked_sub(1)?;
        Some(nanoseconds(self.since).saturating_sub(last))
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_is_counted_where_it_belongs() {
        let counters = IoCounters::default();
        assert_eq!(counters.idle_nanoseconds(), None);
        let now = Instant::now();
        counters.count(IoKind::Read, IoEnd::Done, 512, now);
        counters.count(IoKind::Read, IoEnd::Done, 1024, now);
        counters.count(IoKind::Write, IoEnd::Failed, 512, now);
        counters.count(IoKind::Flush, IoEnd::Invalid, 0, now);
        let read = counters.sums(IoKind::Read);
        assert_eq!((read.operations, read.bytes, read.failed, read.invalid), (2, 1536, 0, 0));
        let write = counters.sums(IoKind::Write);
        assert_eq!((write.operations, write.bytes, write.failed), (0, 0, 1));
        let flush = counters.sums(IoKind::Flush);
        assert_eq!((flush.invalid, flush.nanoseconds), (1, 0));
        assert_eq!(counters.sums(IoKind::Unmap), IoSums::default());
        assert!(counters.idle_nanoseconds().is_some());
    }
}
