//! Tests of the whole crate on real image files, with QEMU's tools as oracle where installed.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

mod activity;
mod bitmap_changes;
mod bitmap_tools;
mod bitmaps;
mod chains;
mod check;
mod common;
mod compressed;
mod concurrency;
mod create;
mod data_file;
mod external;
mod faults;
mod graph;
mod graphs;
mod headers;
mod image_options;
mod jobs_backup;
mod jobs_common;
mod jobs_mirror;
mod large;
mod lazy;
mod locks;
mod metadata;
mod model;
mod queue;
mod races;
mod reopen;
mod repair;
mod replace;
mod resize;
mod snapshot_sizes;
mod snapshot_view;
mod snapshots;
mod space;
mod switch;
mod together;
mod twin;
mod vmstate;
