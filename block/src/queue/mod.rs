//! Asynchronous requests on a node, for one owner thread.
//!
//! ```text
//! submit ──> staged ──kick──> in flight ──> completed ──reap──> owner
//! ```
//!
//! The owner's loop is: submit what there is, [`Queue::kick`], [`Queue::reap`], answer, then wait for
//! its own events and [`Queue::event`] together. See `docs/data-path.md`.

mod bufs;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use bufs::{AlignedBuf, BUF_ALIGN, OwnedBufs};

use crate::{Error, Node, Result};

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
    node: Arc<Node>,
    staged: Vec<Request>,
    completed: Vec<Completion>,
    event: EventFd,
}

impl Queue {
    /// A queue on the node.
    ///
    /// # Errors
    /// If the host has no descriptor left.
    pub fn new(node: Arc<Node>) -> Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
            Error::Io { operation: "eventfd", filename: node.name().to_owned(), offset: 0, source }
        })?;
        Ok(Self { node, staged: Vec::new(), completed: Vec::new(), event })
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Takes a request; nothing is done before [`Queue::kick`].
    pub fn submit(&mut self, request: Request) {
        self.staged.push(request);
    }

    /// Starts everything that was submitted. What can be done at once is: always [`Queue::reap`]
    /// after it, for such completions do not signal [`Queue::event`].
    pub fn kick(&mut self) {
        for mut request in std::mem::take(&mut self.staged) {
            let result = execute(&self.node, request.op, &mut request.bufs);
            self.completed.push(Completion { id: request.id, result, bufs: request.bufs });
        }
    }

    /// Moves all completions to the end of `out` and gives their number. Clears the event.
    pub fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        let count = self.completed.len();
        out.append(&mut self.completed);
        count
    }

    /// Requests that were submitted and not reaped.
    pub fn in_flight(&self) -> usize {
        self.staged.len() + self.completed.len()
    }

    /// Readable when completions wait that came after the last [`Queue::kick`] or [`Queue::reap`].
    /// The owner only polls it.
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.event`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    /// Kicks, and waits until there is something to reap, unless nothing is in flight.
    pub fn wait(&mut self) {
        self.kick();
    }

    /// Kicks, waits until every request is completed, and reaps them.
    pub fn drain(&mut self, out: &mut Vec<Completion>) {
        self.kick();
        self.reap(out);
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event()
    }
}

/// Carries out a request, waiting for it.
fn execute(node: &Node, op: Op, bufs: &mut OwnedBufs) -> Result<()> {
    match op {
        Op::Read { offset } => node.read(offset, bufs.read_bufs()),
        Op::Write { offset, fua } => {
            node.write(offset, bufs.write_bufs())?;
            if fua { node.flush() } else { Ok(()) }
        }
        Op::Flush => node.flush(),
        Op::Discard { offset, len } => node.discard(offset, len),
        Op::WriteZeroes { offset, len, unmap, fua } => {
            node.write_zeroes(offset, len, unmap)?;
            if fua { node.flush() } else { Ok(()) }
        }
    }
}

#[cfg(test)]
mod tests;
