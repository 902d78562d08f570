//! Token buckets: how fast a job may go, and how much I/O a disk may do.
//!
//! A bucket leaks at a rate; what is done fills it. While it holds more than it has room for, whoever
//! wants to do more waits for as long as the surplus takes to leak away. So a single request may be
//! larger than the bucket: it is let through, and those after it pay for it.
//!
//! Nothing here looks at a clock: times come from the caller and count from any fixed moment.

use std::time::Duration;

use crate::{Error, Result};

/// Largest value of any limit, as in QEMU (THROTTLE_VALUE_MAX).
pub const MAX_VALUE: u64 = 1_000_000_000_000_000;

/// Levels are kept in billionths of a unit: what leaks in a nanosecond is a whole number then.
const NANO: u128 = 1_000_000_000;
/// Without a burst rate there is room for what leaks in a tenth of a second.
const ROOM: u64 = 10;

/// How fast a bucket leaks and how much room it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units per second over a long time; 0 for no limit.
    pub average: u64,
    /// Units per second in a burst; 0 if there are none.
    pub max: u64,
    /// How many seconds a burst may last at `max`.
    pub burst_secs: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, max: 0, burst_secs: 1 }
    }
}

impl Rate {
    /// A rate without bursts.
    pub const fn steady(average: u64) -> Self {
        Self { average, max: 0, burst_secs: 1 }
    }

    /// Room of the bucket of the average, in billionths of a unit.
    fn room(self) -> u128 {
        match self.max {
            0 => u128::from(self.average) * NANO / u128::from(ROOM),
            max => u128::from(max) * NANO * u128::from(self.burst_secs.max(1)),
        }
    }

    /// Whether bursts have a limit of their own besides their sum.
    fn limits_bursts(self) -> bool {
        self.max > 0 && self.burst_secs > 1
    }
}

/// A level that leaks.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    units: u128,
}

impl Level {
    fn leak(&mut self, rate: u64, time: Duration) {
        self.units = self.units.saturating_sub(time.as_nanos().saturating_mul(rate.into()));
    }

    /// How long it takes at a rate until no more than `room` is left.
    fn wait(self, room: u128, rate: u64) -> Duration {
        match self.units.saturating_sub(room) {
            0 => Duration::ZERO,
            surplus => {
                let nanos = surplus.div_ceil(u128::from(rate.max(1)));
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
        }
    }
}

/// One bucket. See the module.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bucket {
    rate: Rate,
    level: Level,
    burst: Level,
    /// When it leaked last.
    at: Duration,
}

impl Bucket {
    /// An empty bucket.
    pub fn new(rate: Rate) -> Self {
        Self { rate, ..Self::default() }
    }

    /// How fast it leaks.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Changes the rate; what was done before at the old one is forgotten.
    pub fn set_rate(&mut self, rate: Rate, now: Duration) {
        *self = Self { at: now, ..Self::new(rate) };
    }

    /// How long to wait before anything may be done; zero if it may be done now.
    pub fn wait(&mut self, now: Duration) -> Duration {
        if self.rate.average == 0 {
            return Duration::ZERO;
        }
        let time = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        self.level.leak(self.rate.average, time);
        let wait = self.level.wait(self.rate.room(), self.rate.average);
        if !self.rate.limits_bursts() {
            return wait;
        }
        self.burst.leak(self.rate.max, time);
        let room = u128::from(self.rate.max) * NANO / u128::from(ROOM);
        wait.max(self.burst.wait(room, self.rate.max))
    }

    /// Notes that so many units are done.
    pub fn take(&mut self, units: u64) {
        if self.rate.average == 0 {
            return;
        }
        let units = u128::from(units) * NANO;
        self.level.units = self.level.units.saturating_add(units);
        if self.rate.limits_bursts() {
            self.burst.units = self.burst.units.saturating_add(units);
        }
    }
}

/// Limits of one kind: of all requests together, or of reads and writes each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kind {
    /// Of all together.
    pub total: Rate,
    /// Of reads.
    pub read: Rate,
    /// Of writes.
    pub write: Rate,
}

impl Kind {
    fn all(self) -> [Rate; 3] {
        [self.total, self.read, self.write]
    }

    fn is_mixed(self, value: impl Fn(Rate) -> u64) -> bool {
        value(self.total) > 0 && (value(self.read) > 0 || value(self.write) > 0)
    }
}

/// The limits of a disk, as block_set_io_throttle gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes per second.
    pub bytes: Kind,
    /// Requests per second.
    pub requests: Kind,
    /// Bytes for which a larger request counts as several; 0 if each is one.
    pub request_size: u64,
}

impl Limits {
    /// Whether anything is limited.
    pub fn any(&self) -> bool {
        self.rates().any(|rate| rate.average > 0)
    }

    fn rates(&self) -> impl Iterator<Item = Rate> {
        self.bytes.all().into_iter().chain(self.requests.all())
    }

    /// Refuses limits that contradict each other.
    ///
    /// # Errors
    /// With QEMU's text.
    pub fn check(&self) -> Result<()> {
        let refuse = |text: &str| Err(Error::Invalid(text.to_owned()));
        let mixed =
            |kind: Kind| kind.is_mixed(|rate| rate.average) || kind.is_mixed(|rate| rate.max);
        if mixed(self.bytes) || mixed(self.requests) {
            return refuse(
                "bps/iops/max total values and read/write values cannot be used at the same time",
            );
        }
        if self.request_size > 0 && self.requests.all().iter().all(|rate| rate.average == 0) {
            return refuse("iops size requires an iops value to be set");
        }
        for rate in self.rates() {
            if rate.average > MAX_VALUE || rate.max > MAX_VALUE {
                return refuse("bps/iops/max values must be within [0, 1000000000000000]");
            }
            if rate.burst_secs == 0 {
                return refuse("the burst length cannot be 0");
            }
            if rate.burst_secs > 1 && rate.max == 0 {
                return refuse("burst length set without burst rate");
            }
            if rate.max > 0 && rate.burst_secs > MAX_VALUE / rate.max {
                return refuse("burst length too high for this burst rate");
            }
            if rate.max > 0 && rate.average == 0 {
                return refuse("bps_max/iops_max require corresponding bps/iops values");
            }
            if rate.max > 0 && rate.max < rate.average {
                return refuse("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }
}

/// The buckets of a disk.
#[derive(Debug, Clone, Default)]
pub struct Throttle {
    limits: Limits,
    /// Of bytes and of requests: all, reads, writes.
    bytes: [Bucket; 3],
    requests: [Bucket; 3],
}

impl Throttle {
    /// Buckets with nothing in them.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            bytes: limits.bytes.all().map(Bucket::new),
            requests: limits.requests.all().map(Bucket::new),
        }
    }

    /// What they keep to.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How long to wait before the next read or write may begin; zero if it may now.
    pub fn wait(&mut self, now: Duration, write: bool) -> Duration {
        let own = 1 + usize::from(write);
        let mut longest = Duration::ZERO;
        for kind in [&mut self.bytes, &mut self.requests] {
            for index in [0, own] {
                longest = longest.max(kind[index].wait(now));
            }
        }
        longest
    }

    /// Notes that a read or write of so many bytes begins.
    pub fn take(&mut self, bytes: u64, write: bool) {
        let own = 1 + usize::from(write);
        let requests = match self.limits.request_size {
            0 => 1,
            size => bytes.div_ceil(size).max(1),
        };
        for index in [0, own] {
            self.bytes[index].take(bytes);
            self.requests[index].take(requests);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Does requests of `size` whenever they may begin; how many within `time`.
    fn run(bucket: &mut Bucket, start: Duration, time: Duration, size: u64) -> u64 {
        let (mut now, mut done) = (start, 0);
        loop {
            let wait = bucket.wait(now);
            now += wait;
            if now >= start + time {
                return done;
            }
            if wait.is_zero() {
                bucket.take(size);
                done += 1;
            }
        }
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let mut bucket = Bucket::default();
        bucket.take(u64::MAX);
        assert_eq!(bucket.wait(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_steady_rate_holds_over_time_and_has_room_for_a_tenth_of_a_second() {
        let mut bucket = Bucket::new(Rate::steady(1000));
        let done = run(&mut bucket, Duration::ZERO, ms(10_000), 10);
        // 10 seconds, and the room.
        assert_eq!(done, 1000 + 10);
        bucket.take(500);
        let wait = bucket.wait(ms(10_000));
        assert!(wait > ms(490) && wait <= ms(520), "{wait:?}");
    }

    #[test]
    fn a_request_larger_than_the_bucket_is_let_through_and_paid_for_later() {
        let mut bucket = Bucket::new(Rate::steady(100));
        assert_eq!(bucket.wait(ms(5)), Duration::ZERO);
        bucket.take(1 << 20);
        assert_eq!(bucket.wait(ms(5)), Duration::from_millis(((1 << 20) - 10) * 10));
        // Time that runs backwards gives nothing back.
        assert_eq!(bucket.wait(ms(1)), Duration::from_millis(((1 << 20) - 10) * 10));
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut bucket = Bucket::new(Rate::steady(1000));
        bucket.take(10);
        assert_eq!(run(&mut bucket, ms(1_000_000), ms(1000), 10), 100 + 10);
    }

    #[test]
    fn a_burst_goes_at_its_rate_for_its_time_and_then_on_average() {
        let rate = Rate { average: 100, max: 1000, burst_secs: 10 };
        let mut bucket = Bucket::new(rate);
        let first = run(&mut bucket, Duration::ZERO, ms(10_000), 10);
        assert!((990..=1020).contains(&first), "{first}");
        // It has leaked 1000 of its room of 10000 meanwhile, which is done in about a second more.
        let second = run(&mut bucket, ms(10_000), ms(10_000), 10);
        assert!((190..=230).contains(&second), "{second}");
        let third = run(&mut bucket, ms(20_000), ms(10_000), 10);
        assert!((99..=102).contains(&third), "{third}");
    }

    #[test]
    fn another_rate_forgets_what_was_done() {
        let mut bucket = Bucket::new(Rate::steady(1));
        bucket.take(1_000_000);
        assert!(bucket.wait(ms(1)) > ms(1_000_000));
        bucket.set_rate(Rate::steady(2), ms(1));
        assert_eq!(bucket.wait(ms(1)), Duration::ZERO);
    }

    #[test]
    fn reads_and_writes_have_limits_apart_and_together() {
        let read = Rate::steady(1000);
        let bytes = Kind { read, ..Kind::default() };
        let requests = Kind { total: Rate::steady(10), ..Kind::default() };
        let mut throttle = Throttle::new(Limits { bytes, requests, request_size: 0 });
        throttle.take(2000, false);
        assert_eq!(throttle.wait(ms(0), false), ms(1900));
        assert_eq!(throttle.wait(ms(0), true), Duration::ZERO);
        throttle.take(1, true);
        assert_eq!(throttle.wait(ms(0), true), ms(100));
        assert_eq!(throttle.wait(ms(100), true), Duration::ZERO);
    }

    #[test]
    fn large_requests_count_as_several() {
        let requests = Kind { total: Rate::steady(10), ..Kind::default() };
        let limits = Limits { requests, request_size: 4096, ..Limits::default() };
        let mut throttle = Throttle::new(limits);
        throttle.take(4096 * 4 + 1, true);
        assert_eq!(throttle.wait(ms(0), false), ms(400));
    }

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let with = |bytes: Kind| Limits { bytes, ..Limits::default() };
        let text = |limits: Limits| limits.check().unwrap_err().to_string();
        let steady = Rate::steady(5);
        let mixed = Kind { total: steady, read: steady, write: Rate::default() };
        assert!(text(with(mixed)).starts_with("bps/iops/max total values"));
        let total = |total| with(Kind { total, ..Kind::default() });
        assert!(text(total(Rate::steady(MAX_VALUE + 1))).contains("must be within"));
        let rate = Rate { average: 0, max: 5, burst_secs: 1 };
        assert!(text(total(rate)).contains("require corresponding"));
        let rate = Rate { average: 6, max: 5, burst_secs: 1 };
        assert!(text(total(rate)).contains("cannot be lower"));
        let rate = Rate { average: 6, max: 0, burst_secs: 2 };
        assert!(text(total(rate)).contains("without burst rate"));
        let rate = Rate { average: 6, max: 7, burst_secs: 0 };
        assert!(text(total(rate)).contains("cannot be 0"));
        let rate = Rate { average: 6, max: MAX_VALUE, burst_secs: 2 };
        assert!(text(total(rate)).contains("too high"));
        assert!(text(Limits { request_size: 1, ..Limits::default() }).contains("iops size"));
        let rate = Rate { average: 6, max: 7, burst_secs: 3 };
        total(rate).check().unwrap();
        assert!(total(rate).any() && !Limits::default().any());
    }
}
