//! What the engine's own synchronisation is built of: the standard library's, or loom's where the
//! crate `loom` tries every order of threads. `Arc` is the standard library's in both.

pub(crate) use std::sync::atomic::AtomicU64;
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
