//! What `block` has written itself to order threads, compiled against loom: each model is run once
//! for every order in which its threads can meet, with every value that the memory model lets them
//! see. A data race, a thread that waits for ever, or an assertion that fails in one of them fails
//! the model.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "models fail by panicking")]

#[allow(dead_code, unreachable_pub, reason = "block uses more of it than the models")]
#[path = "../../block/src/node/gate.rs"]
mod gate;
#[allow(dead_code, unreachable_pub, reason = "block uses more of it than the models")]
#[path = "../../block/src/qcow2/inflight.rs"]
mod inflight;

/// Stands for `block::sync`.
mod sync {
    pub(crate) use loom::sync::atomic::AtomicU64;
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
}

pub mod gates;
pub mod ranges;

/// Runs a model of up to three threads. With more switches between threads than `preemptions` where
/// none has to wait, there would be too many orders; errors that need so many are rare.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}
