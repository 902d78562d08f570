//! What a crash may cost, tried on recorded work: see `docs/crash-safety.md`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

mod chains;
#[allow(dead_code, reason = "shared with the other tests, which use all of it")]
#[path = "../suite/common.rs"]
mod common;
mod faults;
mod kill;
mod kinds;
mod operations;
mod pages;
mod parallel;
mod points;
mod record;
mod replay;
mod short;
mod timeline;
mod verify;
mod workload;

use block::storage::{FileOptions, Locking};

/// A lock would live on in programs that other tests are about to start, until they are executed.
pub(crate) fn unlocked() -> FileOptions {
    FileOptions { locking: Locking::Off, ..FileOptions::default() }
}
