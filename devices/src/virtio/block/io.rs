//! Carrying out virtio-blk requests, on the disk's thread: many at once, through a
//! [`block::queue::Queue`](::block::queue::Queue).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ::block::queue::{Completion, Op, OwnedBufs, Queue};
use slab::Slab;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::SERIAL_SIZE;
use super::config::MAX_RANGES;
use super::counters::{IoCounters, IoEnd, IoKind};
use super::errors::{ErrorAction, IoErrors};
use super::pending::{Account, Failure, Outcome, Pending};
use super::request::{Extent, Operation, RANGE_SIZE, Range, Request};
use super::throttled::{IoThrottle, Throttled};
use crate::presence::Unusable;
use crate::virtio::chain::{Chain, Malformed, SegmentList};
use crate::virtio::{End, Ended, QueueHandler, Served, Token};
use crate::{GuestMemory, Presence};

/// Data of one request at most, in bytes: bounds how long a request, and so a pause, can take.
pub(crate) const MAX_REQUEST_BYTES: u64 = 256 << 20;

/// What the machine sees of a disk's work, too.
pub(super) struct Shared {
    pub(super) counters: Arc<IoCounters>,
    pub(super) errors: Arc<IoErrors>,
    pub(super) throttle: Arc<IoThrottle>,
}

/// What a disk is.
pub(super) struct Disk<'a> {
    /// In sectors.
    pub(super) capacity: Arc<AtomicU64>,
    pub(super) serial: &'a str,
    /// Requests of all its queues, of a driver that keeps to the rules.
    pub(super) most: usize,
}

pub(super) struct BlockHandler {
    link: ::block::Link,
    /// Comes before `memory`: its drop waits for what uses it.
    queue: Queue,
    requests: Slab<Pending>,
    completions: Vec<Completion>,
    /// Keeps guest memory mapped for requests in flight.
    memory: Option<Arc<GuestMemory>>,
    presence: Presence,
    counters: Arc<IoCounters>,
    errors: Arc<IoErrors>,
    /// Requests that may not begin yet.
    throttled: Throttled<::block::queue::Request>,
    /// See [`Disk::most`].
    most: usize,
    /// In sectors; the device changes it.
    capacity: Arc<AtomicU64>,
    serial: [u8; SERIAL_SIZE],
    /// The driver knows no flush: every write must be durable when it completes.
    write_through: bool,
}

impl BlockHandler {
    pub(super) fn new(
        link: ::block::Link,
        disk: Disk<'_>,
        presence: Presence,
        shared: Shared,
    ) -> ::block::Result<Self> {
        let mut padded = [0; SERIAL_SIZE];
        for (to, from) in padded.iter_mut().zip(disk.serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            queue: Queue::new(link.clone())?,
            link,
            requests: Slab::new(),
            completions: Vec::new(),
            memory: None,
            presence,
            counters: shared.counters,
            errors: shared.errors,
            throttled: Throttled::new(shared.throttle),
            most: disk.most,
            capacity: disk.capacity,
            serial: padded,
            write_through: true,
        })
    }

    /// What a request makes the image do, one after another, and with which memory; nothing if it
    /// is done already.
    fn plan(
        &mut self,
        operation: Operation,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<(Vec<Op>, OwnedBufs), Failure> {
        let plain = |ops| Ok((ops, OwnedBufs::none()));
        match operation {
            Operation::Read(sector) => {
                let extent = self.extent(sector, &chain.writable)?;
                let bufs = self.bufs(mem, &chain.writable, Presence::wait_to_fill)?;
                Ok((vec![Op::Read { offset: extent.offset }], bufs))
            }
            Operation::Write(sector) => {
                self.writable()?;
                let extent = self.extent(sector, &chain.readable)?;
                let bufs = self.bufs(mem, &chain.readable, Presence::wait_for)?;
                Ok((vec![Op::Write { offset: extent.offset, fua: self.write_through }], bufs))
            }
            Operation::Flush => plain(vec![Op::Flush]),
            Operation::GetId => {
                self.get_id(mem, &chain.writable)?;
                plain(Vec::new())
            }
            Operation::Discard => plain(self.ranges(true, mem, &mut chain.readable)?),
            Operation::WriteZeroes => plain(self.ranges(false, mem, &mut chain.readable)?),
            Operation::Unknown(_) => Err(Failure::Unsupported),
        }
    }

    fn get_id(&self, mem: &GuestMemory, to: &SegmentList) -> Outcome {
        let mut rest = self.serial.as_slice();
        for segment in to.segments() {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            mem.write_slice(now, segment.addr).map_err(|_| Failure::IoError)?;
            rest = later;
        }
        Ok(())
    }

    /// Discard or write-zeroes: every range is checked before the first is carried out.
    fn ranges(
        &self,
        discard: bool,
        mem: &GuestMemory,
        from: &mut SegmentList,
    ) -> Result<Vec<Op>, Failure> {
        self.writable()?;
        let count = from.len() / RANGE_SIZE as u64;
        if count == 0
            || count > u64::from(MAX_RANGES)
            || !from.len().is_multiple_of(RANGE_SIZE as u64)
        {
            return Err(Failure::IoError);
        }
        let mut ops = Vec::new();
        let mut bytes = [0; RANGE_SIZE];
        while !from.is_empty() {
            match from.read_front(mem, &mut bytes) {
                Ok(true) => {}
                _ => return Err(Failure::IoError),
            }
            let range = Range::parse(bytes);
            if !range.flags_are_known(discard) {
                return Err(Failure::Unsupported);
            }
            let Extent { offset, len } = range.extent(self.capacity()).ok_or(Failure::IoError)?;
            if len == 0 {
                continue;
            }
            ops.push(if discard {
                Op::Discard { offset, len }
            } else {
                Op::WriteZeroes { offset, len, unmap: range.unmap(), fua: false }
            });
        }
        if self.write_through {
            ops.push(Op::Flush);
        }
        Ok(ops)
    }

    fn writable(&self) -> Outcome {
        if self.link.node().read_only() { Err(Failure::IoError) } else { Ok(()) }
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// The part of the disk that the data is for.
    fn extent(&self, sector: u64, data: &SegmentList) -> Result<Extent, Failure> {
        let len = data.len();
        if len > MAX_REQUEST_BYTES {
            return Err(Failure::IoError);
        }
        Extent::new(sector, len, self.capacity()).ok_or(Failure::IoError)
    }

    /// The segments as buffers, once the host may use them.
    fn bufs(
        &mut self,
        mem: &GuestMemory,
        data: &SegmentList,
        wait: fn(&Presence, &GuestMemory, GuestAddress, usize) -> Result<(), Unusable>,
    ) -> Result<OwnedBufs, Failure> {
        let keep = self.memory.get_or_insert_with(|| Arc::new(mem.clone())).clone();
        let mut parts = Vec::with_capacity(data.segments().len());
        for segment in data.segments() {
            let there = wait(&self.presence, &keep, segment.addr, segment.len as usize);
            there.map_err(|_| Failure::IoError)?;
            for slice in GuestMemoryBackend::get_slices(&*keep, segment.addr, segment.len as usize)
            {
                let slice = slice.map_err(|_| Failure::IoError)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                parts.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
        }
        // SAFETY: the slices are parts of mappings of guest RAM, which are readable and writable
        // and stay as long as the memory, which goes with the buffers, has them. Guest memory is
        // only ever reached through raw pointers and volatile slices, so no reference to it exists.
        Ok(unsafe { OwnedBufs::from_raw(parts, keep) })
    }
}

impl QueueHandler for BlockHandler {
    fn start(&mut self, features: u64) {
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn serve(
        &mut self,
        token: Token,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<Served, Malformed> {
        let request = Request::parse(mem, chain)?;
        let data = match request.operation {
            Operation::Read(_) => chain.writable.len(),
            Operation::GetId => chain.writable.len().min(SERIAL_SIZE as u64),
            _ => 0,
        };
        let started = Instant::now();
        let given = chain.readable.len();
        let planned = self.plan(request.operation, mem, chain);
        let mut pending = Pending::new(token, request.status, data);
        let bytes = planned.as_ref().map_or(0, |(ops, _)| bytes_of(ops, data, given));
        let account = |kind| Account { kind, bytes, started };
        pending.account = IoKind::of(request.operation).map(account);
        if let Operation::Read(_) = request.operation {
            pending.filling(chain.writable.segments());
        }
        match planned {
            Ok((ops, bufs)) => {
                pending.todo = ops.into();
                if let Some(op) = pending.todo.pop_front() {
                    let id = self.requests.insert(pending) as u64;
                    self.begin(::block::queue::Request { id, op, bufs }, request.operation, bytes);
                    return Ok(Served::Later);
                }
                self.count(&pending, IoEnd::Done);
                pending.answer(mem, Ok(())).map(Served::Done)
            }
            Err(failure) => {
                self.count(&pending, IoEnd::Invalid);
                pending.answer(mem, Err(failure)).map(Served::Done)
            }
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.queue.event())
    }

    fn ended(&mut self, all: bool, mem: &GuestMemory, out: &mut Vec<Ended>) {
        let mut completions = std::mem::take(&mut self.completions);
        loop {
            let ready = if all { self.throttled.all() } else { self.throttled.ready() };
            ready.into_iter().for_each(|request| self.queue.submit(request));
            if all {
                self.queue.wait();
            } else {
                self.queue.kick();
            }
            self.queue.reap(&mut completions);
            let mut more = false;
            for completion in completions.drain(..) {
                more |= self.completed(completion, mem, out);
            }
            let left = all && self.queue.in_flight() > 0;
            if !more && !left {
                break;
            }
        }
        self.completions = completions;
    }

    fn is_full(&self) -> bool {
        self.throttled.len() >= self.most
    }

    fn wait(&self) -> Option<Duration> {
        self.throttled.wait()
    }

    fn resumed(&mut self) {
        self.errors.follow();
    }

    fn flush(&mut self) -> ::block::Result<()> {
        if self.link.node().read_only() {
            return Ok(());
        }
        self.link.flush()
    }
}

impl BlockHandler {
    /// Begins a request, now or when the disk's limits let it.
    fn begin(&mut self, request: ::block::queue::Request, operation: Operation, bytes: u64) {
        let now = match operation {
            Operation::Read(_) => self.throttled.admit(request, false, bytes),
            Operation::Write(_) | Operation::WriteZeroes => {
                self.throttled.admit(request, true, bytes)
            }
            _ => Some(request),
        };
        if let Some(request) = now {
            self.queue.submit(request);
        }
    }

    fn count(&self, pending: &Pending, end: IoEnd) {
        if let Some(Account { kind, bytes, started }) = pending.account {
            self.counters.count(kind, end, bytes, started);
        }
    }

    /// Goes on with a request of which a part is completed; says whether there was more to do.
    fn completed(
        &mut self,
        Completion { id, result, bufs }: Completion,
        mem: &GuestMemory,
        out: &mut Vec<Ended>,
    ) -> bool {
        let Some(pending) = usize::try_from(id).ok().and_then(|id| self.requests.get_mut(id))
        else {
            return false;
        };
        let mut outcome = Ok(());
        let mut held = false;
        if let Err(error) = result {
            tracing::error!(node = self.link.node().name(), %error, "a request of the guest failed");
            let read = pending.account.is_some_and(|account| account.kind == IoKind::Read);
            match self.errors.failed(!read, &error) {
                ErrorAction::Report => outcome = Err(Failure::IoError),
                ErrorAction::Ignore => {}
                ErrorAction::Stop => held = true,
            }
        }
        if held {
            let token = pending.token;
            pending.leave(mem);
            out.push(Ended { token, end: End::Held });
            self.requests.remove(usize::try_from(id).unwrap_or(usize::MAX));
            return false;
        }
        if outcome.is_ok()
            && let Some(op) = pending.todo.pop_front()
        {
            self.queue.submit(::block::queue::Request { id, op, bufs });
            return true;
        }
        if let Some(Account { kind, bytes, started }) = pending.account {
            let end = if outcome.is_ok() { IoEnd::Done } else { IoEnd::Failed };
            self.counters.count(kind, end, bytes, started);
        }
        let token = pending.token;
        // The status byte was in memory when the chain was read, and memory does not go away.
        let len = pending.answer(mem, outcome).unwrap_or(0);
        out.push(Ended { token, end: End::Done(len) });
        self.requests.remove(usize::try_from(id).unwrap_or(usize::MAX));
        false
    }
}

/// The bytes that a request is about.
fn bytes_of(ops: &[Op], read: u64, given: u64) -> u64 {
    let bytes = |op: &Op| match *op {
        Op::Read { .. } => read,
        Op::Write { .. } => given,
        Op::WriteZeroes { len, .. } | Op::Discard { len, .. } => len,
        _ => 0,
    };
    ops.iter().map(bytes).sum()
}
