//! Whole saves, loads and deletes on images in memory that fail at any step on demand.

// Helpers outside of test functions fail the test that called them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fake;
mod faults;
mod lazy;
mod live;
mod refusals;
mod round_trip;
mod support;
