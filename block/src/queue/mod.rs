//! Asynchronous requests on a node, for one owner thread.
//!
//! ```text
//! submit ──> staged ──kick──> in flight ──> completed ──reap──> owner
//! ```
//!
//! The owner's loop is: submit what there is, [`Queue::kick`], [`Queue::reap`], answer, then wait for
//! its own events and [`Queue::event`] together. See `docs/data-path.md`.

mod bufs;
mod engine;
mod handover;
mod located;
mod pool;
mod ring;
mod transfer;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub(crate) use bufs::BUF_ALIGN;
pub use bufs::{AlignedBuf, OwnedBufs};
pub use located::Located;
pub(crate) use located::{Around, Extent, MAX_COPY, Place};

use engine::Engine;

use crate::{Error, Link, Node, Result};

/// What a request asks for. Offsets and lengths are bytes of the node's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fill the request's buffers from the disk.
    Read {
        /// Where to start.
        offset: u64,
    },
    /// Write the request's buffers to the disk.
    Write {
        /// Where to start.
        offset: u64,
        /// Whether it must be durable when it completes.
        fua: bool,
    },
    /// Make every write durable that was completed before this was submitted.
    Flush,
    /// Tell that a range is not needed.
    Discard {
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        len: u64,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
        /// Whether it must be durable when it completes.
        fua: bool,
    },
}

/// A request. Its memory is the queue's until the request is completed.
#[derive(Debug)]
pub struct Request {
    /// The owner's name for it, given back with the completion. Need not be unique.
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// The data of a read or write; its length is the request's.
    pub bufs: OwnedBufs,
}

impl Request {
    /// A read that fills `bufs`.
    pub fn read(id: u64, offset: u64, bufs: OwnedBufs) -> Self {
        Self { id, op: Op::Read { offset }, bufs }
    }

    /// A write of `bufs`.
    pub fn write(id: u64, offset: u64, fua: bool, bufs: OwnedBufs) -> Self {
        Self { id, op: Op::Write { offset, fua }, bufs }
    }

    /// A request without data.
    pub fn plain(id: u64, op: Op) -> Self {
        Self { id, op, bufs: OwnedBufs::none() }
    }
}

/// What became of a request.
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub id: u64,
    /// Why it failed; [`Error::errno`] has it as a number.
    pub result: Result<()>,
    /// The request's. A failed read may have filled some.
    pub bufs: OwnedBufs,
}

/// Requests of one owner thread on a node. See the module.
///
/// Requests in flight together are not ordered, as on any disk: an owner that needs an order waits
/// for completions. Dropping the queue waits for what is in flight.
#[derive(Debug)]
pub struct Queue {
    link: Link,
    staged: Vec<Request>,
    engine: Engine,
    /// Submitted and not reaped.
    in_flight: usize,
    event: Epoll,
}

impl Queue {
    /// A queue on the node of the link: a request goes to the one that it is when the request is
    /// begun.
    ///
    /// # Errors
    /// If the host has no descriptor left.
    pub fn new(link: impl Into<Link>) -> Result<Self> {
        let link = link.into();
        let failed = |source| Error::Io {
            operation: "open a request queue",
            filename: link.node().name().to_owned(),
            offset: 0,
            source,
        };
        let engine = Engine::new(link.clone()).map_err(failed)?;
        let event = Epoll::new().map_err(failed)?;
        for fd in engine.fds() {
            let readable = EpollEvent::new(EventSet::IN, 0);
            event.ctl(ControlOperation::Add, fd, readable).map_err(failed)?;
        }
        Ok(Self { link, staged: Vec::new(), engine, in_flight: 0, event })
    }

    /// The node as it is now.
    pub fn node(&self) -> Arc<Node> {
        self.link.node()
    }

    /// Takes a request; nothing is done before [`Queue::kick`].
    pub fn submit(&mut self, request: Request) {
        self.staged.push(request);
        self.in_flight += 1;
    }

    /// Says whether the owner has more to do at once than what it has submitted, such as requests that
    /// are there already: then large writes are copied by a thread beside it.
    pub(crate) fn set_busy(&mut self, busy: bool) {
        self.engine.set_busy(busy);
    }

    /// Starts everything that was submitted. What can be done at once is: always [`Queue::reap`]
    /// after it, for such completions do not signal [`Queue::event`].
    pub fn kick(&mut self) {
        if !self.staged.is_empty() {
            let mut staged = std::mem::take(&mut self.staged);
            self.engine.start_all(staged.drain(..));
            self.staged = staged;
        }
        self.engine.submit(0);
    }

    /// Moves all completions to the end of `out` and gives their number. Clears the event.
    pub fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        self.engine.collect();
        self.engine.submit(0);
        let count = self.engine.completed.len();
        self.in_flight -= count;
        out.append(&mut self.engine.completed);
        count
    }

    /// Requests that were submitted and not reaped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Readable when completions wait that came after the last [`Queue::kick`] or [`Queue::reap`].
    /// The owner only polls it (a signal-like wake-up of io_uring may end its poll with EINTR).
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.event`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    /// Kicks, and waits until there is something to reap, unless nothing is in flight.
    pub fn wait(&mut self) {
        self.kick();
        while self.engine.completed.is_empty() && self.in_flight > 0 {
            if self.engine.on_threads() || self.engine.on_ring() == 0 {
                let mut events = [EpollEvent::default(); 2];
                // The only error is EINTR: the loop looks again.
                let _ = self.event.wait(-1, &mut events);
            } else {
                self.engine.submit(1);
            }
            self.engine.collect();
            self.engine.submit(0);
        }
    }

    /// Kicks, waits until every request is completed, and reaps them.
    pub fn drain(&mut self, out: &mut Vec<Completion>) {
        while self.in_flight > 0 {
            self.wait();
            self.reap(out);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // The kernel and other threads have pointers to the requests' memory.
        self.drain(&mut Vec::new());
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event()
    }
}

#[cfg(test)]
mod tests;
