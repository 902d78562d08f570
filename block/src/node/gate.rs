//! Lets requests through to a node, or holds them back while the node is changed.
//!
//! ```text
//!   enter ──> request in flight ──> leave          (any number at once)
//!   hold  ──> new requests wait ──> the last in flight leaves ──> held     (any number at once)
//!   close ──> as hold, and one at a time: its owner changes the node
//! ```
//!
//! Gates are closed from the top of the graph down: a request in an overlay may have to enter the
//! gate of its backing node before it can leave its own, so the overlay's must be empty first.
//! Whoever carries several requests at once and completes them itself must not wait in
//! [`Gate::enter`] with requests in flight, which could then never leave: it uses
//! [`Gate::try_enter`], completes what it has, and waits only then.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::sync::{AtomicU64, Condvar, Mutex};

/// Set while one owner closes the gate or has closed it.
const OWNED: u64 = 1 << 63;
/// Those who hold requests back, the owner among them, are counted in the bits from here to the owner's.
const HOLDER: u64 = 1 << 48;
const HOLDERS: u64 = OWNED - HOLDER;
/// The bits that count requests in flight.
const IN_FLIGHT: u64 = HOLDER - 1;

#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: AtomicU64,
    changed: Condvar,
    lock: Mutex<()>,
}

/// A request in flight; over when dropped.
#[derive(Debug)]
pub(crate) struct Passage(Arc<Gate>);

/// A gate that lets no request through; no longer when dropped.
#[derive(Debug)]
pub(crate) struct Holding(Arc<Gate>);

/// A closed gate; open again when dropped, unless somebody else holds it.
#[derive(Debug)]
pub(crate) struct Closed(Holding);

impl Gate {
    /// Lets a request in, unless the gate is closed.
    pub(crate) fn try_enter(self: &Arc<Self>) -> Option<Passage> {
        // Acquire: what the last owner changed is seen.
        if self.state.fetch_add(1, Ordering::Acquire) & HOLDERS == 0 {
            return Some(Passage(Arc::clone(self)));
        }
        self.leave();
        None
    }

    /// Lets a request in, once the gate is open.
    pub(crate) fn enter(self: &Arc<Self>) -> Passage {
        loop {
            if let Some(passage) = self.try_enter() {
                return passage;
            }
            self.wait(|state| state & HOLDERS == 0);
        }
    }

    /// Holds new requests back and waits until those in flight are over; others may do so, and one
    /// of them may own the gate.
    pub(crate) fn hold(self: &Arc<Self>) -> Holding {
        self.state.fetch_add(HOLDER, Ordering::AcqRel);
        let holding = Holding(Arc::clone(self));
        self.wait(|state| state & IN_FLIGHT == 0);
        holding
    }

    /// As [`Gate::hold`], for one owner at a time.
    pub(crate) fn close(self: &Arc<Self>) -> Closed {
        while self.state.fetch_or(OWNED, Ordering::AcqRel) & OWNED != 0 {
            self.wait(|state| state & OWNED == 0);
        }
        Closed(self.hold())
    }

    fn leave(&self) {
        // Release: an owner sees what the request did.
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        if before & HOLDERS != 0 && before & IN_FLIGHT == 1 {
            self.wake();
        }
    }

    fn wait(&self, until: impl Fn(u64) -> bool) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !until(self.state.load(Ordering::Acquire)) {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wake(&self) {
        // With the lock, so that it does not come between a waiter's look and its sleep.
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.state.fetch_sub(HOLDER, Ordering::AcqRel);
        self.0.wake();
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        // The next owner may come; requests once the hold is dropped, too, which wakes all.
        self.0.0.state.fetch_and(!OWNED, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_gate_closes_when_the_last_request_is_over_and_holds_later_ones() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter();
        let (told, tells) = channel();
        let closer = {
            let (gate, told) = (gate.clone(), told.clone());
            thread::spawn(move || {
                let closed = gate.close();
                told.send("closed").unwrap();
                closed
            })
        };
        while gate.try_enter().is_some() {
            thread::yield_now();
        }
        assert!(tells.try_recv().is_err(), "closed with a request in flight");
        drop(first);
        let closed = closer.join().unwrap();
        assert_eq!(tells.recv().unwrap(), "closed");
        assert!(gate.try_enter().is_none());
        let later = {
            let gate = gate.clone();
            thread::spawn(move || {
                let _passage = gate.enter();
                told.send("entered").unwrap();
            })
        };
        assert!(tells.try_recv().is_err(), "entered a closed gate");
        drop(closed);
        assert_eq!(tells.recv().unwrap(), "entered");
        later.join().unwrap();
        drop(gate.close());
    }

    #[test]
    fn a_held_gate_can_be_closed_and_opens_when_all_have_let_go() {
        let gate = Arc::new(Gate::default());
        let (first, second) = (gate.hold(), gate.hold());
        drop(gate.close());
        drop(first);
        assert!(gate.try_enter().is_none(), "the second still holds it");
        let closed = gate.close();
        drop(second);
        assert!(gate.try_enter().is_none(), "it is closed");
        drop(closed);
        assert!(gate.try_enter().is_some());
    }

    #[test]
    fn requests_and_owners_of_many_threads_all_get_through() {
        let gate = Arc::new(Gate::default());
        let value = AtomicU64::new(0);
        thread::scope(|scope| {
            for n in 0..8 {
                let (gate, value) = (&gate, &value);
                scope.spawn(move || {
                    for _ in 0..300 {
                        if n < 2 {
                            let _closed = gate.close();
                            let seen = value.load(Ordering::Relaxed);
                            thread::yield_now();
                            assert_eq!(value.load(Ordering::Relaxed), seen);
                        } else {
                            let _passage = gate.enter();
                            value.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(value.load(Ordering::Relaxed), 6 * 300);
    }
}
