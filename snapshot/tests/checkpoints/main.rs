//! Whole saves, loads and deletes on images in memory that fail at any step on demand.

mod fake;
mod faults;
mod refusals;
mod round_trip;
mod support;
