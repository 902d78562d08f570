//! The machine in this process, with a bare-metal guest in it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod dirty_pages;
mod support;
