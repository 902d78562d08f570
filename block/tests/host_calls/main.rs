//! Changes of the graph, and whole files, while the host fails or does less than it was asked for: see
//! `docs/crash-safety.md`, "Faults".
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests fail by panicking, and calls of the host without an answer have no other way out"
)]

mod calls;
mod changes;
mod files;
mod images;
