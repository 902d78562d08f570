//! Whole saves, loads and deletes on images in memory that fail at any step on demand.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers fail the test that calls them"
)]

mod fake;
mod faults;
mod lazy;
mod live;
mod refusals;
mod round_trip;
mod support;
