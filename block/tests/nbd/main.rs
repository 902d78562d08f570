//! The NBD server, asked by real clients (QEMU's and libnbd's) and by one of our own that can also
//! misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail")]
#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod client;
mod clients;
mod common;
mod exports;
mod hostile;
mod model;
mod status;
mod zeroes;
