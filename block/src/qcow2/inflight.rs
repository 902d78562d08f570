//! Which guest ranges are being worked on, so that requests for one cluster are ordered.
//!
//! Requests queue in order of arrival; one waits for every earlier one that it conflicts with.
//! A request holds one range at a time, so there is no cycle to wait in. Who must not wait (the
//! owner of a [`crate::queue::Queue`]) only tries, and never gets past one that waits.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use crate::sync::{Condvar, Mutex, MutexGuard};

#[derive(Debug)]
struct Request {
    id: u64,
    range: Range<u64>,
    exclusive: bool,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    requests: Vec<Request>,
    /// How many of the requests wait: without any, the end of a request need not be told.
    waiting: usize,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    ended: Condvar,
}

/// The requests in flight and waiting.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    shared: Arc<Shared>,
}

/// A range held until this is dropped, by any thread.
#[derive(Debug)]
pub(crate) struct Held {
    shared: Arc<Shared>,
    id: u64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Whether a request conflicts with one before it; with id `next`, with any.
    fn conflict(&self, id: u64, range: &Range<u64>, exclusive: bool) -> bool {
        self.requests
            .iter()
            .take_while(|r| r.id != id)
            .any(|r| (exclusive || r.exclusive) && overlap(&r.range, range))
    }

    fn push(&mut self, range: Range<u64>, exclusive: bool) -> u64 {
        let id = self.next;
        self.next += 1;
        self.requests.push(Request { id, range, exclusive });
        id
    }
}

impl InFlight {
    /// Holds a range together with others that only use what is mapped already.
    pub(crate) fn shared(&self, range: Range<u64>) -> Held {
        self.hold(range, false)
    }

    /// Holds a range alone, to change how it is mapped.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> Held {
        self.hold(range, true)
    }

    /// As [`InFlight::shared`]; `None` if it would have to wait.
    pub(crate) fn try_shared(&self, range: Range<u64>) -> Option<Held> {
        self.try_hold(range, false)
    }

    /// As [`InFlight::exclusive`]; `None` if it would have to wait.
    pub(crate) fn try_exclusive(&self, range: Range<u64>) -> Option<Held> {
        self.try_hold(range, true)
    }

    fn try_hold(&self, range: Range<u64>, exclusive: bool) -> Option<Held> {
        let mut queue = self.shared.queue();
        let next = queue.next;
        if queue.conflict(next, &range, exclusive) {
            return None;
        }
        let id = queue.push(range, exclusive);
        drop(queue);
        Some(Held { shared: self.shared.clone(), id })
    }

    fn hold(&self, range: Range<u64>, exclusive: bool) -> Held {
        let mut queue = self.shared.queue();
        let id = queue.push(range.clone(), exclusive);
        if queue.conflict(id, &range, exclusive) {
            queue.waiting += 1;
            while queue.conflict(id, &range, exclusive) {
                queue = self.shared.ended.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            queue.waiting -= 1;
        }
        drop(queue);
        Held { shared: self.shared.clone(), id }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.requests.retain(|r| r.id != self.id);
        let wake = queue.waiting > 0;
        drop(queue);
        if wake {
            self.shared.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// Starts a request in a thread and gives what tells that it holds its range.
    fn start<'s>(
        scope: &'s thread::Scope<'s, '_>,
        all: &'s InFlight,
        range: Range<u64>,
        exclusive: bool,
    ) -> mpsc::Receiver<()> {
        let before = all.shared.queue().next;
        let (held, receiver) = mpsc::channel();
        scope.spawn(move || {
            let _held = all.hold(range, exclusive);
            let _ = held.send(());
        });
        while all.shared.queue().next == before {
            thread::yield_now();
        }
        receiver
    }

    #[test]
    fn conflicting_requests_wait_in_order_and_others_pass() {
        let all = InFlight::default();
        let first = all.shared(0..10);
        let also = all.shared(5..15);
        thread::scope(|scope| {
            let writer = start(scope, &all, 8..12, true);
            // It came after the writer and must not overtake it.
            let reader = start(scope, &all, 11..20, false);
            let elsewhere = start(scope, &all, 20..30, true);
            elsewhere.recv().unwrap();
            assert_eq!(writer.try_recv(), Err(mpsc::TryRecvError::Empty));
            drop(first);
            assert_eq!(writer.try_recv(), Err(mpsc::TryRecvError::Empty));
            assert_eq!(reader.try_recv(), Err(mpsc::TryRecvError::Empty));
            drop(also);
            writer.recv().unwrap();
            reader.recv().unwrap();
        });
        assert!(all.shared.queue().requests.is_empty());
    }

    #[test]
    fn who_only_tries_never_gets_past_one_that_waits() {
        let all = InFlight::default();
        let first = all.try_shared(0..10).unwrap();
        assert!(all.try_exclusive(9..12).is_none());
        drop(all.try_shared(9..12).unwrap());
        thread::scope(|scope| {
            let writer = start(scope, &all, 0..5, true);
            assert!(all.try_shared(4..6).is_none());
            drop(all.try_exclusive(10..12).unwrap());
            drop(first);
            writer.recv().unwrap();
        });
        assert_eq!(all.shared.queue().waiting, 0);
        drop(all.try_exclusive(0..100).unwrap());
    }
}
