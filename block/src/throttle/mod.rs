//! Token buckets: how fast a job may go, and how much I/O a disk may do.
//!
//! A bucket leaks at a rate; what is done fills it. While it holds more than it has room for, whoever
//! wants to do more waits for as long as the surplus takes to leak away. So a single request may be
//! larger than the bucket: it is let through, and those after it pay for it.
//!
//! Nothing here looks at a clock: times come from the caller and count from any fixed moment.

mod group;

pub use group::{Clock, ThrottleGroup, monotonic};

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
mod tests;
