//! Large buffered writes that a thread does while the owner goes on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::transfer::Transfer;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Transfer>,
    /// Whether a thread takes them.
    served: bool,
}

/// Those that wait for the one thread, in order.
#[derive(Debug, Default, Clone)]
pub(super) struct Writes(Arc<Mutex<State>>);

impl Writes {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one; says whether a thread is needed, which then calls [`Writes::next`] to the end.
    pub(super) fn push(&self, transfer: Transfer) -> bool {
        let mut state = self.state();
        state.waiting.push_back(transfer);
        !std::mem::replace(&mut state.served, true)
    }

    /// The next; after `None` another thread is needed.
    pub(super) fn next(&self) -> Option<Transfer> {
        let mut state = self.state();
        let next = state.waiting.pop_front();
        state.served = next.is_some();
        next
    }
}
