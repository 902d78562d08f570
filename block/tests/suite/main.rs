//! Tests of the whole crate on real image files, with QEMU's tools as oracle where installed.

mod common;
mod concurrency;
mod faults;
mod graph;
mod headers;
mod locks;
mod model;
mod snapshots;
