//! What was done to a host file, for query-blockstats.

use std::sync::atomic::{AtomicU64, Ordering};

/// Sums since the file was opened. Each is right by itself; a reader may see a request in some of them
/// only.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// End of the highest write.
    highest: Highest,
    discards: AtomicU64,
    failed_discards: AtomicU64,
    discarded_bytes: AtomicU64,
}

/// Discards of a host file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Discards {
    /// Those that succeeded.
    pub done: u64,
    /// Those that failed, or that the host has no call for.
    pub failed: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

impl Counters {
    pub(super) fn highest(&self) -> &Highest {
        &self.highest
    }

    pub(super) fn discarded(&self, bytes: u64, done: bool) {
        if done {
            self.discards.fetch_add(1, Ordering::Relaxed);
            self.discarded_bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed_discards.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn discards(&self) -> Discards {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Discards {
            done: get(&self.discards),
            failed: get(&self.failed_discards),
            bytes: get(&self.discarded_bytes),
        }
    }

    /// The same sums, for the file under another descriptor.
    pub(super) fn copy(&self) -> Self {
        let Discards { done, failed, bytes } = self.discards();
        Self {
            highest: self.highest.copy(),
            discards: done.into(),
            failed_discards: failed.into(),
            discarded_bytes: bytes.into(),
        }
    }
}

/// End of the highest write, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Highest(AtomicU64);

impl Highest {
    /// A write went up to this byte, or was to.
    pub(crate) fn wrote_up_to(&self, end: u64) {
        // Most do not go higher: they need not take the cache line from other CPUs.
        if self.0.load(Ordering::Relaxed) < end {
            self.0.fetch_max(end, Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn copy(&self) -> Self {
        Self(self.get().into())
    }
}
