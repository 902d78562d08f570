//! How long saves kept the guest standing.

use std::time::Duration;

use qmp::schema::{CheckpointStats, PauseBucket};

/// Upper bounds of the buckets double from 64 microseconds to 67 seconds; the last has the rest.
const BUCKETS: usize = 21;
const FIRST_MICROS: u64 = 64;

/// A histogram of pauses.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    counts: [u64; BUCKETS],
    last: Duration,
    longest: Duration,
    total: Duration,
}

impl Pauses {
    pub(super) fn record(&mut self, pause: Duration) {
        let micros = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        let bucket = (0..BUCKETS - 1).find(|at| micros <= FIRST_MICROS << at);
        self.counts[bucket.unwrap_or(BUCKETS - 1)] += 1;
        self.last = pause;
        self.longest = self.longest.max(pause);
        self.total += pause;
    }

    /// As query-checkpoint-stats tells it. Empty buckets are left out.
    pub(super) fn stats(&self) -> CheckpointStats {
        let bound = |at| (at < BUCKETS - 1).then(|| number(FIRST_MICROS << at));
        let bucket =
            |(at, count): (usize, &u64)| PauseBucket { up_to_us: bound(at), count: number(*count) };
        let filled = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        CheckpointStats {
            saves: number(self.counts.iter().sum()),
            last_pause_ns: nanoseconds(self.last),
            longest_pause_ns: nanoseconds(self.longest),
            total_pause_ns: nanoseconds(self.total),
            pauses: filled.map(bucket).collect(),
        }
    }
}

/// A duration as JSON has it.
pub(super) fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_fall_into_buckets_that_double() {
        let mut pauses = Pauses::default();
        assert_eq!(pauses.stats().pauses, []);
        for micros in [1, 64, 65, 128, 129, 90_000_000] {
            pauses.record(Duration::from_micros(micros));
        }
        let stats = pauses.stats();
        let buckets: Vec<_> = stats.pauses.iter().map(|b| (b.up_to_us, b.count)).collect();
        assert_eq!(buckets, [(Some(64), 2), (Some(128), 2), (Some(256), 1), (None, 1)]);
        assert_eq!(stats.saves, 6);
        assert_eq!(stats.last_pause_ns, 90_000_000_000);
        assert_eq!(stats.longest_pause_ns, 90_000_000_000);
        assert_eq!(stats.total_pause_ns, 90_000_387_000);
    }
}
