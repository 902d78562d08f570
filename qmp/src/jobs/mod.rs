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
//! [`state`] has the whole table of QEMU, which is pure. [`Jobs`] is the list of jobs; it belongs to
//! one thread, has no lock, and does no work: a job's work runs elsewhere, is reached through
//! [`Work`], and reports back through the thread that owns the list.

mod registry;
pub mod state;

#[cfg(test)]
mod tests;

pub use registry::{AutoFlags, Jobs, Outcome, StateError, Work, WorkReport};
