//! Which guest ranges are being worked on, so that requests for one cluster are ordered.
//!
//! Requests queue in order of arrival; one waits for every earlier one that it conflicts with.
//! A request holds one range at a time, so there is no cycle to wait in.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

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
}

/// The requests in flight and waiting.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    queue: Mutex<Queue>,
    ended: Condvar,
}

/// A range held until this is dropped.
#[derive(Debug)]
pub(super) struct Held<'a> {
    all: &'a InFlight,
    id: u64,
}

impl InFlight {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a range together with others that only use what is mapped already.
    pub(crate) fn shared(&self, range: Range<u64>) -> Held<'_> {
        self.hold(range, false)
    }

    /// Holds a range alone, to change how it is mapped.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> Held<'_> {
        self.hold(range, true)
    }

    fn hold(&self, range: Range<u64>, exclusive: bool) -> Held<'_> {
        let mut queue = self.queue();
        let id = queue.next;
        queue.next += 1;
        queue.requests.push(Request { id, range: range.clone(), exclusive });
        let conflicts = |queue: &mut Queue| {
            queue
                .requests
                .iter()
                .take_while(|r| r.id != id)
                .any(|r| (exclusive || r.exclusive) && overlap(&r.range, &range))
        };
        let queue = self.ended.wait_while(queue, conflicts).unwrap_or_else(PoisonError::into_inner);
        drop(queue);
        Held { all: self, id }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut queue = self.all.queue();
        queue.requests.retain(|r| r.id != self.id);
        let wake = !queue.requests.is_empty();
        drop(queue);
        if wake {
            self.all.ended.notify_all();
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
        let before = all.queue().next;
        let (held, receiver) = mpsc::channel();
        scope.spawn(move || {
            let _held = all.hold(range, exclusive);
            let _ = held.send(());
        });
        while all.queue().next == before {
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
        assert!(all.queue().requests.is_empty());
    }
}
