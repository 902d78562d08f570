//! What other threads finish for the owner of a queue.
//!
//! The event is written and cleared with the lock held, so it is readable exactly when something
//! waits: no completion is slept over and no wake-up is without cause.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

#[derive(Debug)]
struct State<T> {
    done: Vec<T>,
    event: EventFd,
}

/// Both ends of the hand-over.
#[derive(Debug)]
pub(super) struct HandOver<T>(Arc<Mutex<State<T>>>);

impl<T> Clone for HandOver<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> HandOver<T> {
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Mutex::new(State { done: Vec::new(), event }))))
    }

    /// Hands something over, from any thread.
    pub(super) fn put(&self, item: T) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.done.push(item);
        if state.done.len() == 1
            && let Err(e) = state.event.write(1)
        {
            tracing::error!("a disk request's completion cannot be told: {e}");
        }
    }

    /// Takes all that was handed over.
    pub(super) fn take(&self, into: &mut Vec<T>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.done.is_empty() {
            into.append(&mut state.done);
            // It was written once, so it is not empty; an error would say that it is.
            let _ = state.event.read();
        }
    }

    /// Readable while something waits. Open as long as any clone lives.
    pub(super) fn fd(&self) -> RawFd {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_is_readable_exactly_while_something_waits() {
        let ends = HandOver::new().unwrap();
        let readable = || {
            let mut fd = libc::pollfd { fd: ends.fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd that outlives the call.
            unsafe { libc::poll(&raw mut fd, 1, 0) == 1 }
        };
        let mut out = Vec::new();
        assert!(!readable());
        ends.put(1);
        ends.put(2);
        assert!(readable());
        ends.take(&mut out);
        assert!(!readable());
        ends.take(&mut out);
        ends.put(3);
        assert!(readable());
        ends.take(&mut out);
        assert_eq!(out, [1, 2, 3]);
    }
}
