//! How a long operation tells how far it is, and learns that it is no longer wanted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{Error, Result};

/// Shared between an operation and whoever watches it. Both counts are bytes and only grow.
#[derive(Debug, Default)]
pub struct Progress {
    current: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
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
        self.cancelled.store(true, Ordering::Release);
    }

    /// `Err(Cancelled)` once [`Progress::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Acquire) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
