//! Jobs: long work that a client starts, watches and ends by its id.
//!
//! ```text
//!              start            pause              (each also: cancel, fail -> aborting)
//!   created ---------> running <------> paused
//!                      |     |
//!                ready |     | done
//!                      v     |      pause
//!                    ready <-+-------------> standby
//!                      |     |
//!             complete |     v     all of the transaction wait      finalize (by itself, or told)
//!                      +-> waiting ------------------------> pending -------------------+
//!                                                                                       v
//!   created, running, ready, waiting, pending -- cancel, fail --> aborting -------> concluded
//!                                                                                       |
//!                                                    null (gone) <---- dismiss (by itself, or told)
//! ```
//!
//! [`state`] has the whole table of QEMU, which is pure. [`Jobs`] is the list of jobs. It does no work
//! and waits for nothing: a job's work runs elsewhere, is reached through [`Work`], and reports back.
//! Jobs of one transaction end together: see `group.rs`.
//!
//! Who shares the list puts it into a mutex. That lock is the last one that is taken: [`Work`] is
//! called with it held, so work reports with no lock of its own.

mod group;
mod job;
mod registry;
pub mod state;
mod verbs;
mod work;

#[cfg(test)]
mod tests;

use registry::Sink;
pub use registry::{GroupId, IoFailure, Jobs, NewJob, StateError};
pub use work::{AutoFlags, Outcome, Settle, Step, Work, WorkReport};
