//! The transmission phase: one thread, one queue, many requests in flight.
//!
//! ```text
//! receive ──> take requests ──> queue ──> completions ──> outbox ──> send
//!    ▲                                                                │
//!    └──────────── wait for the socket and the queue's event ◄────────┘
//! ```
//!
//! One call receives whatever the client has sent, one kick starts all of it, and one call sends all
//! replies. Replies leave in the order of completion. What a connection holds in memory is bounded by
//! [`MAX_REQUESTS`] and [`MAX_HELD`]: beyond these nothing is received.

use std::sync::Arc;

use slab::Slab;

use crate::node::Entered;
use crate::num::{to_u64, to_usize};
use crate::queue::{AlignedBuf, Completion, Op, OwnedBufs, Queue, Request as QueueRequest};

use super::command::{Command, Limits, Refusal};
use super::connection::Failure;
use super::export::Export;
use super::extents;
use super::inbox::Inbox;
use super::negotiate::{Offered, Session};
use super::outbox::Outbox;
use super::pool::Pool;
use super::socket::Socket;
use super::wire::reply::To;
use super::wire::request::{Request, header_len};
use super::wire::{Errno, Mode};

mod look;
mod pending;
mod reads;
mod receive;

use look::Look;
use pending::{Group, Pending, Work, errno_of};

/// Requests in flight.
const MAX_REQUESTS: usize = 256;
/// Bytes of data in flight or waiting to be sent, beyond which no request is begun.
const MAX_HELD: usize = 64 << 20;
/// Payloads of at least this size are received straight to where they are written from.
const DIRECT_PAYLOAD: u32 = 16 << 10;
/// Bytes of data begun before replies are sent: the data is still in the processor's cache then, and
/// the client has something to do while the rest is read.
const BATCH: usize = 256 << 10;

/// What the next bytes of the stream are.
enum Incoming {
    /// A request.
    Header,
    /// The payload of a write.
    Payload(Write),
    /// The payload of a request that is refused after it.
    Skip { to: To, left: u64, refusal: Refusal },
}

/// A write whose payload is on its way; the first `filled` bytes are there.
struct Write {
    to: To,
    offset: u64,
    len: u32,
    fua: bool,
    buf: AlignedBuf,
    filled: usize,
}

/// One client's transmission phase.
pub(super) struct Transmission {
    socket: Arc<Socket>,
    inbox: Inbox,
    outbox: Outbox,
    pool: Pool,
    mode: Mode,
    contexts: Vec<u32>,
    incoming: Incoming,
    /// The last write was large: receive no more than a header ahead, its payload goes elsewhere.
    large: bool,
    /// All that was received has been looked at, and is no whole request.
    starved: bool,
    /// The socket had less than was asked for.
    drained: bool,
    /// The client said that it goes.
    disconnected: bool,
    /// The client has closed its side.
    closed: bool,
    look: Look,
    pending: Slab<Pending>,
    groups: Slab<Group>,
    /// Data bytes in flight.
    held: usize,
    completions: Vec<Completion>,
    queue: Queue,
    export: Arc<Export>,
}

impl Transmission {
    pub(super) fn new(
        socket: Arc<Socket>,
        inbox: Inbox,
        session: Session<Arc<Export>>,
    ) -> Result<Self, Failure> {
        Ok(Self {
            socket,
            inbox,
            outbox: Outbox::default(),
            pool: Pool::default(),
            mode: session.mode,
            contexts: session.contexts,
            incoming: Incoming::Header,
            large: false,
            starved: false,
            drained: false,
            disconnected: false,
            closed: false,
            look: Look::default(),
            pending: Slab::new(),
            groups: Slab::new(),
            held: 0,
            completions: Vec::new(),
            queue: Queue::new(session.export.link().clone())?,
            export: session.export,
        })
    }

    /// Serves until the client disconnects or vanishes, or somebody shuts the socket down. Requests
    /// under way are completed in any case.
    pub(super) fn run(&mut self) -> Result<(), Failure> {
        loop {
            self.take_requests()?;
            self.queue.set_busy(!self.inbox.bytes().is_empty());
            self.queue.kick();
            self.finish_requests();
            self.outbox.send(&self.socket, &mut self.pool)?;
            let idle = self.queue.in_flight() == 0 && self.outbox.is_empty();
            if idle && (self.disconnected || (self.closed && self.starved)) {
                return Ok(());
            }
            let wants_input = self.starved || self.disconnected;
            if wants_input || self.is_full() {
                self.receive(idle)?;
            }
        }
    }

    /// Whether no further request may be begun.
    fn is_full(&self) -> bool {
        self.pending.len() >= MAX_REQUESTS || self.held + self.outbox.held() >= MAX_HELD
    }

    /// Begins the requests that have been received, or some of them.
    fn take_requests(&mut self) -> Result<(), Failure> {
        self.starved = false;
        let before = self.held;
        while !self.disconnected && !self.is_full() && self.held < before + BATCH {
            if !self.take_one()? {
                self.starved = true;
                break;
            }
        }
        Ok(())
    }

    /// Says whether there was enough for anything.
    fn take_one(&mut self) -> Result<bool, Failure> {
        match &mut self.incoming {
            Incoming::Header => {
                let decoded = Request::decode(self.inbox.bytes(), self.mode);
                let Some(request) = decoded.map_err(|e| Failure::Protocol(e.to_string()))? else {
                    return Ok(false);
                };
                self.inbox.consume(header_len(self.mode));
                self.begin(&request);
            }
            Incoming::Payload(write) => {
                let len = write.len as usize;
                write.filled += self.inbox.take(&mut write.buf[write.filled..len]);
                if write.filled < len {
                    return Ok(false);
                }
                if let Incoming::Payload(write) =
                    std::mem::replace(&mut self.incoming, Incoming::Header)
                {
                    self.begin_write(write);
                }
            }
            Incoming::Skip { to, left, refusal } => {
                let n = self.inbox.bytes().len().min(to_usize(*left));
                self.inbox.consume(n);
                *left -= to_u64(n);
                if *left > 0 {
                    return Ok(false);
                }
                let (to, refusal) = (*to, *refusal);
                self.incoming = Incoming::Header;
                self.refuse(to, refusal);
            }
        }
        Ok(true)
    }

    fn limits(&self) -> Limits {
        Limits {
            size: self.export.node().size(),
            read_only: self.export.read_only(),
            mode: self.mode,
            contexts: !self.contexts.is_empty(),
        }
    }

    fn begin(&mut self, request: &Request) {
        let to = To { mode: self.mode, cookie: request.cookie, offset: request.offset };
        let payload = request.payload(self.mode);
        let large = self.large;
        self.large = false;
        match self.limits().check(request) {
            Err(refusal) if payload > 0 => {
                self.incoming = Incoming::Skip { to, left: payload, refusal };
            }
            Err(refusal) => self.refuse(to, refusal),
            Ok(Command::Write { offset, len, fua }) => {
                self.large = len >= DIRECT_PAYLOAD || (large && len == 0);
                let buf = self.pool.take(len as usize);
                self.incoming = Incoming::Payload(Write { to, offset, len, fua, buf, filled: 0 });
            }
            Ok(Command::Read { offset, len: 0, .. }) => self.empty_read(to, offset),
            Ok(Command::Read { offset, len, whole }) => self.begin_read(to, offset, len, whole),
            Ok(Command::Flush) => self.submit(to, Work::Flush, Op::Flush, OwnedBufs::none()),
            Ok(
                Command::Trim { len: 0, .. }
                | Command::WriteZeroes { len: 0, .. }
                | Command::Cache { len: 0, .. },
            ) => {
                self.outbox.small(|out| to.ok(out));
            }
            Ok(Command::Trim { offset, len, fua }) => {
                self.submit(to, Work::Trim { fua }, Op::Discard { offset, len }, OwnedBufs::none());
            }
            Ok(Command::WriteZeroes { fast: true, .. }) if !self.export.node().fast_zeroes() => {
                self.refuse(to, Refusal(Errno::NotSup, "zeroes would be written"));
            }
            Ok(Command::WriteZeroes { offset, len, unmap, fua, .. }) => {
                let op = Op::WriteZeroes { offset, len, unmap, fua };
                self.submit(to, Work::Zero, op, OwnedBufs::none());
            }
            Ok(Command::Cache { offset, len }) => {
                // The host's page cache has it afterwards.
                let bufs = OwnedBufs::aligned_part(self.pool.take(len as usize), len as usize);
                self.submit(to, Work::Cache, Op::Read { offset }, bufs);
            }
            Ok(Command::BlockStatus { offset, len, one }) => {
                self.block_status(to, offset, len, one);
            }
            Ok(Command::Disconnect) => self.disconnected = true,
        }
    }

    fn refuse(&mut self, to: To, Refusal(error, text): Refusal) {
        self.outbox.small(|out| to.error(out, error, text));
    }

    /// Hands an operation to the queue.
    fn submit(&mut self, to: To, work: Work, op: Op, bufs: OwnedBufs) {
        self.held += to_usize(bufs.len());
        let id = self.pending.insert(Pending { to, work });
        self.queue.submit(QueueRequest { id: to_u64(id), op, bufs });
    }

    fn begin_write(&mut self, write: Write) {
        let Write { to, offset, len, fua, buf, .. } = write;
        if len == 0 {
            self.pool.give(buf);
            return self.outbox.small(|out| to.ok(out));
        }
        let bufs = OwnedBufs::aligned_part(buf, len as usize);
        self.submit(to, Work::Write, Op::Write { offset, fua }, bufs);
    }

    fn block_status(&mut self, to: To, offset: u64, len: u64, one: bool) {
        let entered = self.access();
        let mut lists = Vec::with_capacity(self.contexts.len());
        for id in &self.contexts {
            let Some(context) = self.export.context(*id) else {
                continue;
            };
            match extents::describe(entered.access().format(), &context, offset, len, one) {
                Ok(list) => lists.push((*id, list)),
                Err(e) => {
                    let error = errno_of(&e);
                    tracing::debug!(export = self.export.name(), "block status failed: {e}");
                    return self.outbox.small(|out| to.error(out, error, "block status failed"));
                }
            }
        }
        drop(entered);
        let last = lists.len().saturating_sub(1);
        for (n, (id, list)) in lists.into_iter().enumerate() {
            self.outbox.small(|out| to.status(out, n == last, id, &list));
        }
    }

    /// The image. While it is being replaced, whoever does that waits for our requests in flight.
    fn access(&mut self) -> Entered {
        let link = self.export.link().clone();
        link.try_enter().unwrap_or_else(|| {
            self.queue.drain(&mut self.completions);
            link.enter()
        })
    }

    /// Answers everything that is completed.
    fn finish_requests(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        loop {
            self.queue.reap(&mut completions);
            if completions.is_empty() {
                break;
            }
            for completion in completions.drain(..) {
                self.finish(completion);
            }
            // A flush after a trim, say.
            self.queue.kick();
        }
        self.completions = completions;
    }

    fn finish(&mut self, completion: Completion) {
        let Completion { id, result, bufs } = completion;
        self.held -= to_usize(bufs.len());
        let Some(Pending { to, work }) = self.pending.try_remove(to_usize(id)) else {
            return;
        };
        if let Err(e) = &result {
            tracing::debug!(export = self.export.name(), "an NBD {} failed: {e}", work.name());
        }
        let error = result.err().map(|e| errno_of(&e));
        match (work, error) {
            (Work::Read { offset, group }, error) => {
                self.finish_read(to, offset, group, error, bufs);
            }
            (Work::Trim { fua: true }, None) => {
                self.submit(to, Work::Flush, Op::Flush, OwnedBufs::none());
            }
            (_, None) => {
                self.outbox.small(|out| to.ok(out));
                self.pool.give_bufs(bufs);
            }
            (work, Some(error)) => {
                self.outbox.small(|out| to.error(out, error, work.failure()));
                self.pool.give_bufs(bufs);
            }
        }
    }
}
