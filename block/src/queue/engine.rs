//! What becomes of the requests of a queue, from their start to their completion.
//!
//! ```text
//!              located                        inline
//!  start ──┬──────────────> transfers ──┬──────────────────────┬─> ended ──> finish ──> completed
//!          │                            ├─ ring ───────────────┤               │  ^
//!          │                            └─ transfer threads ───┘               └──┘ FUA; metadata lock taken
//!          ├─ conflict ───> blocked, started again when something of ours has ended;
//!          │                                     after some tries: request threads
//!          └─ else ───────> request threads ────────────────────────────────────────> completed
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once};

use slab::Slab;

use super::handover::HandOver;
use super::located::{Extent, Located, Place};
use super::pool::{REQUESTS, TRANSFERS};
use super::ring::{Ended, Ring};
use super::transfer::{Lists, Step, Transfer};
use super::{Completion, Op, OwnedBufs, Request};
use crate::node::Access;
use crate::storage::Aio;
use crate::{Error, Node, Result};

/// Requests of one queue that threads have at once; further ones wait here.
const MAX_JOBS: usize = 32;
/// Ended transfers and requests whose memory is kept for the next.
const MAX_SPARE: usize = 64;
/// How often a request that is in the way of others is tried before a thread waits in its turn:
/// who only tries can lose against other queues for ever.
const MAX_TRIES: u8 = 8;

/// A located request.
#[derive(Debug)]
struct Active {
    request: Request,
    located: Located,
    access: Arc<Access>,
    /// Transfers that have not ended, and one for the start of others.
    left: usize,
    result: Result<()>,
}

/// What other threads did.
#[derive(Debug)]
enum Done {
    Request(Completion),
    Flush(Vec<u64>, Result<()>),
    Transfer(Transfer, Result<()>),
    /// New places are in the tables, or given back.
    Finished(Box<Active>),
    /// A located write is durable, or could not be made so.
    Durable(Completion),
    /// The ring did not take what it was to start; it is to be asked again.
    AskRing,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Engine {
    node: Arc<Node>,
    ring: Option<Ring>,
    hand_over: HandOver<Done>,
    /// Neighbouring transfers that are being joined.
    run: Option<Transfer>,
    requests: Slab<Active>,
    /// On the ring.
    transfers: Slab<Transfer>,
    /// For the ring, once there is room.
    stalled: VecDeque<Transfer>,
    /// In the way of each other, and how often each was tried.
    blocked: Vec<(Request, u8)>,
    /// For the request threads, once there is room.
    waiting: VecDeque<Work>,
    flushes: Vec<u64>,
    /// Requests that threads have.
    jobs: usize,
    /// Transfers that threads have.
    threads: usize,
    pub(super) completed: Vec<Completion>,
    spare_located: Vec<Located>,
    spare_transfers: Vec<Lists>,
    ended: Vec<Ended>,
    done: Vec<Done>,
}

/// Says that there is no io_uring, once, and aloud only where somebody wants it.
fn tell_no_ring(node: &Arc<Node>, error: &io::Error) {
    static TOLD: Once = Once::new();
    if wants_ring(node) {
        TOLD.call_once(|| {
            tracing::warn!("io_uring cannot be used, threads wait for the disk instead: {error}");
        });
    }
}

/// Whether the file below a node is to be used with io_uring.
fn wants_ring(node: &Arc<Node>) -> bool {
    let mut next = Some(node.clone());
    while let Some(node) = next {
        let details = node.details();
        if let Some(host) = &details.host {
            return host.options().aio == Aio::IoUring;
        }
        next = details.file.clone();
    }
    false
}

/// What a request thread does.
#[derive(Debug)]
enum Work {
    Request(Request),
    Flush(Vec<u64>),
}

impl Engine {
    pub(super) fn new(node: Arc<Node>) -> io::Result<Self> {
        let ring = Ring::new().inspect_err(|e| tell_no_ring(&node, e)).ok();
        Ok(Self {
            node,
            ring,
            hand_over: HandOver::new()?,
            run: None,
            requests: Slab::new(),
            transfers: Slab::new(),
            stalled: VecDeque::new(),
            blocked: Vec::new(),
            waiting: VecDeque::new(),
            flushes: Vec::new(),
            jobs: 0,
            threads: 0,
            completed: Vec::new(),
            spare_located: Vec::new(),
            spare_transfers: Vec::new(),
            ended: Vec::new(),
            done: Vec::new(),
        })
    }

    /// What is readable while something has ended.
    pub(super) fn fds(&self) -> impl Iterator<Item = RawFd> {
        self.ring.iter().map(Ring::fd).chain([self.hand_over.fd()])
    }
}

/// Start.
impl Engine {
    /// Starts requests, all of which are carried out on the image as it is now.
    pub(super) fn start_all(&mut self, requests: impl Iterator<Item = Request>) {
        self.try_all(requests.map(|request| (request, 0)));
    }

    /// As [`Engine::start_all`], for requests that were tried so many times before.
    fn try_all(&mut self, requests: impl Iterator<Item = (Request, u8)>) {
        // While the image is being replaced, threads wait in our place.
        let access = self.node.try_access().map(Arc::new);
        for (request, tries) in requests {
            match (&request.op, &access) {
                (Op::Read { .. } | Op::Write { .. }, Some(access)) => {
                    self.start(request, tries, access);
                }
                (Op::Flush, _) => self.flushes.push(request.id),
                _ => self.give_to_thread(Work::Request(request)),
            }
        }
        self.flush_run();
        if !self.flushes.is_empty() {
            // All of them are satisfied by one that comes after the last.
            let ids = std::mem::take(&mut self.flushes);
            self.give_to_thread(Work::Flush(ids));
        }
    }

    fn start(&mut self, request: Request, tries: u8, access: &Arc<Access>) {
        if self.detects_zeroes(&request) {
            // The thread's write finds them again.
            return self.give_to_thread(Work::Request(request));
        }
        let mut located = self.spare_located.pop().unwrap_or_default();
        let mut found = locate(access, &request, &mut located);
        if !found && located.conflict && self.run.is_some() {
            // Perhaps with what is being joined.
            self.flush_run();
            located.clear();
            found = locate(access, &request, &mut located);
        }
        if found {
            self.transfer(request, located, access);
            return;
        }
        let blocked = located.conflict && !self.requests.is_empty() && tries < MAX_TRIES;
        self.spare(located);
        if blocked {
            self.blocked.push((request, tries + 1));
        } else {
            self.give_to_thread(Work::Request(request));
        }
    }

    /// Whether a request is a write that is to become one of zeroes.
    fn detects_zeroes(&self, request: &Request) -> bool {
        matches!(request.op, Op::Write { .. })
            && self.node.zeroes_to_detect(request.bufs.write_bufs()).is_some()
    }

    /// Starts the transfers of a located request.
    fn transfer(&mut self, request: Request, mut located: Located, access: &Arc<Access>) {
        let write = matches!(request.op, Op::Write { .. });
        let extents = std::mem::take(&mut located.extents);
        let access = access.clone();
        let key =
            self.requests.insert(Active { request, located, access, left: 1, result: Ok(()) });
        let mut skip = 0;
        for extent in &extents {
            self.extent(key, skip, extent, write);
            skip += extent.len;
        }
        if let Some(active) = self.requests.get_mut(key) {
            active.located.extents = extents;
        }
        self.part_ended(key, Ok(()));
    }

    fn extent(&mut self, key: usize, skip: u64, extent: &Extent, write: bool) {
        let len = extent.len;
        let (storage, offset, before, behind) = match &extent.place {
            Place::Zero => {
                if let Some(active) = self.requests.get_mut(key) {
                    active.request.bufs.fill_zero(skip, len);
                }
                return;
            }
            Place::Storage { storage, offset, before, behind } => {
                (storage, *offset - before.len(), before, behind)
            }
        };
        let total = before.len() + len + behind.len();
        if !self.run.as_ref().is_some_and(|run| run.continues(storage, write, offset, total)) {
            self.flush_run();
            let spare = self.spare_transfers.pop().unwrap_or_default();
            self.run = Some(Transfer::new(storage.clone(), write, offset, spare));
        }
        if let (Some(active), Some(run)) = (self.requests.get_mut(key), &mut self.run) {
            active.left += 1;
            run.push(key, |iovs| {
                before.push_to(iovs);
                active.request.bufs.slice_into(skip, len, iovs);
                behind.push_to(iovs);
            });
        }
    }

    /// Starts the transfer that was being joined.
    fn flush_run(&mut self) {
        if let Some(run) = self.run.take() {
            self.begin(run);
        }
    }

    /// Starts a transfer: at once if the page cache can do it, else on the ring or by a thread.
    fn begin(&mut self, mut transfer: Transfer) {
        match transfer.inline() {
            Step::Done => self.transfer_ended(transfer, Ok(())),
            Step::Failed(e) => self.transfer_failed(transfer, e),
            Step::Again => self.begin_waiting(transfer),
        }
    }

    /// Starts a transfer that waits for the disk.
    fn begin_waiting(&mut self, transfer: Transfer) {
        let on_ring = transfer.file().is_some_and(|file| file.options().aio == Aio::IoUring);
        match &mut self.ring {
            Some(ring) if on_ring && ring.is_full() => self.stalled.push_back(transfer),
            Some(_) if on_ring => {
                let key = self.transfers.insert(transfer);
                self.push_to_ring(key);
            }
            _ => self.give_transfer(transfer),
        }
    }

    fn push_to_ring(&mut self, key: usize) {
        let (Some(ring), Some(transfer)) = (&mut self.ring, self.transfers.get(key)) else {
            return;
        };
        let Some(file) = transfer.file() else {
            return;
        };
        let (fd, _, iovs, offset) = transfer.rest(file);
        // SAFETY: the transfer stays in `transfers`, and its requests in `requests`, until the ring
        // says that it has ended; both are dropped only after that (see Queue's Drop). The storage
        // keeps the descriptor open.
        let pushed =
            unsafe { ring.push(crate::num::to_u64(key), transfer.write, fd, iovs, offset) };
        if let Err(e) = pushed {
            let transfer = self.transfers.remove(key);
            self.transfer_failed(transfer, e);
        }
    }

    fn give_transfer(&mut self, transfer: Transfer) {
        self.threads += 1;
        let hand_over = self.hand_over.clone();
        TRANSFERS.run(Box::new(move || {
            let result = caught(|| transfer.wait());
            hand_over.put(Done::Transfer(transfer, result));
        }));
    }

    /// Has a write finished by a thread that may wait for the metadata lock. It is one of those for
    /// transfers, because it holds a range that requests may be waiting for.
    fn give_finish(&mut self, mut active: Active) {
        self.threads += 1;
        let hand_over = self.hand_over.clone();
        TRANSFERS.run(Box::new(move || {
            let finished = caught(|| {
                active.finish_write(true);
                Ok(())
            });
            if let Err(e) = finished {
                active.located.targets.clear();
                active.result = Err(e);
            }
            hand_over.put(Done::Finished(Box::new(active)));
        }));
    }

    /// Has a located write made durable. Not by the threads for requests: all of these may wait at a
    /// gate that closes once this write's access has ended.
    fn give_flush(&mut self, active: Active) {
        self.threads += 1;
        let hand_over = self.hand_over.clone();
        TRANSFERS.run(Box::new(move || {
            let result = caught(|| active.access.flush());
            hand_over.put(Done::Durable(active.complete(result)));
        }));
    }

    fn give_to_thread(&mut self, work: Work) {
        if self.jobs >= MAX_JOBS {
            self.waiting.push_back(work);
            return;
        }
        self.jobs += 1;
        let node = self.node.clone();
        let hand_over = self.hand_over.clone();
        REQUESTS.run(Box::new(move || {
            let done = match work {
                Work::Request(request) => Done::Request(execute(&node, request)),
                Work::Flush(ids) => Done::Flush(ids, caught(|| node.flush())),
            };
            // The owner may be the last to let the node go, once it has the completion.
            drop(node);
            hand_over.put(done);
        }));
    }
}

/// End.
impl Engine {
    /// Takes what has ended, and starts what could not be started before.
    pub(super) fn collect(&mut self) {
        let mut progress = false;
        if let Some(ring) = &mut self.ring
            && ring.in_flight > 0
        {
            let mut ended = std::mem::take(&mut self.ended);
            ring.ended(&mut ended);
            progress |= !ended.is_empty();
            for (key, moved) in ended.drain(..) {
                self.ring_ended(crate::num::to_usize(key), moved);
            }
            self.ended = ended;
        }
        if self.jobs + self.threads > 0 {
            let mut done = std::mem::take(&mut self.done);
            self.hand_over.take(&mut done);
            progress |= !done.is_empty();
            for done in done.drain(..) {
                self.thread_ended(done);
            }
            self.done = done;
        }
        if progress {
            self.start_held_back();
        }
    }

    fn start_held_back(&mut self) {
        while let Some(work) = self.waiting.pop_front() {
            self.give_to_thread(work);
            if self.jobs >= MAX_JOBS {
                break;
            }
        }
        while self.ring.as_ref().is_some_and(|ring| !ring.is_full())
            && let Some(transfer) = self.stalled.pop_front()
        {
            self.begin_waiting(transfer);
        }
        if !self.blocked.is_empty() {
            let blocked = std::mem::take(&mut self.blocked);
            self.try_all(blocked.into_iter());
        }
    }

    fn ring_ended(&mut self, key: usize, moved: io::Result<u64>) {
        let Some(transfer) = self.transfers.get_mut(key) else {
            return;
        };
        match transfer.moved(moved) {
            Step::Again => self.push_to_ring(key),
            Step::Done => {
                let transfer = self.transfers.remove(key);
                self.transfer_ended(transfer, Ok(()));
            }
            Step::Failed(e) => {
                let transfer = self.transfers.remove(key);
                self.transfer_failed(transfer, e);
            }
        }
    }

    fn thread_ended(&mut self, done: Done) {
        match done {
            Done::Request(completion) => {
                self.jobs -= 1;
                self.completed.push(completion);
            }
            Done::Flush(ids, result) => {
                self.jobs -= 1;
                let results = each(result, ids.len());
                self.completed.extend(
                    ids.into_iter().zip(results).map(|(id, result)| Completion {
                        id,
                        result,
                        bufs: OwnedBufs::none(),
                    }),
                );
            }
            Done::Transfer(transfer, result) => {
                self.threads -= 1;
                self.transfer_ended(transfer, result);
            }
            Done::Finished(active) => {
                self.threads -= 1;
                self.finish(*active);
            }
            Done::Durable(completion) => {
                self.threads -= 1;
                self.completed.push(completion);
            }
            Done::AskRing => self.threads -= 1,
        }
    }

    fn transfer_failed(&mut self, transfer: Transfer, e: io::Error) {
        let error = transfer.error(e);
        self.transfer_ended(transfer, Err(error));
    }

    fn transfer_ended(&mut self, transfer: Transfer, result: Result<()>) {
        match result {
            // Each by itself, so that only those fail that must.
            Err(_) if transfer.parts().len() > 1 => {
                for one in transfer.split() {
                    self.begin(one);
                }
            }
            Err(e) => {
                if let Some(part) = transfer.parts().first() {
                    self.part_ended(part.request, Err(e));
                }
            }
            Ok(()) => {
                for part in transfer.parts() {
                    self.part_ended(part.request, Ok(()));
                }
                if self.spare_transfers.len() < MAX_SPARE {
                    self.spare_transfers.push(transfer.emptied());
                }
            }
        }
    }

    fn part_ended(&mut self, key: usize, result: Result<()>) {
        let Some(active) = self.requests.get_mut(key) else {
            return;
        };
        active.left -= 1;
        if active.result.is_ok() {
            active.result = result;
        }
        if active.left == 0 {
            let active = self.requests.remove(key);
            self.finish(active);
        }
    }

    /// All transfers of a request have ended.
    fn finish(&mut self, mut active: Active) {
        if let Op::Write { fua, .. } = active.request.op {
            if !active.finish_write(false) {
                return self.give_finish(active);
            }
            active.note(&self.node);
            if fua && active.result.is_ok() {
                // Others need not wait for the flush.
                active.located.clear();
                return self.give_flush(active);
            }
        }
        let located = std::mem::take(&mut active.located);
        self.spare(located);
        let result = std::mem::replace(&mut active.result, Ok(()));
        self.completed.push(active.complete(result));
    }

    fn spare(&mut self, mut located: Located) {
        located.clear();
        if self.spare_located.len() < MAX_SPARE {
            self.spare_located.push(located);
        }
    }
}

/// Waiting.
impl Engine {
    /// Starts what is on the ring, and waits until `want` transfers of it have ended.
    pub(super) fn submit(&mut self, want: usize) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        if let Err(e) = ring.submit(want) {
            tracing::warn!("io_uring does not take requests now: {e}");
            self.threads += 1;
            self.hand_over.put(Done::AskRing);
        }
    }

    /// Transfers on the ring.
    pub(super) fn on_ring(&self) -> usize {
        self.transfers.len()
    }

    /// Whether threads have something of ours.
    pub(super) fn on_threads(&self) -> bool {
        self.jobs + self.threads > 0
    }
}

impl Active {
    /// Puts new places into the tables or gives them back; false if that must be done again, waiting.
    fn finish_write(&mut self, wait: bool) -> bool {
        if self.located.targets.is_empty() {
            return true;
        }
        let written = self.result.is_ok();
        match self.access.finish_write(&mut self.located, written, wait) {
            Some(result) => {
                self.located.targets.clear();
                if written {
                    self.result = result;
                }
                true
            }
            None => false,
        }
    }

    fn complete(self, result: Result<()>) -> Completion {
        Completion { id: self.request.id, result, bufs: self.request.bufs }
    }

    /// Tells those who watch the node.
    fn note(&self, node: &Node) {
        if let Op::Write { offset, .. } = self.request.op {
            node.note_write(offset, self.request.bufs.len());
        }
    }
}

/// Where a request is, if that can be told at once.
fn locate(access: &Access, request: &Request, located: &mut Located) -> bool {
    let len = request.bufs.len();
    if len == 0 {
        return false;
    }
    match request.op {
        Op::Read { offset } => access.locate_read(offset, len, located),
        Op::Write { offset, .. } => access.locate_write(offset, len, located),
        _ => false,
    }
}

/// Carries out a request, waiting for it.
fn execute(node: &Node, request: Request) -> Completion {
    let Request { id, op, mut bufs } = request;
    let result = caught(|| {
        let (result, fua) = match op {
            Op::Read { offset } => (node.read(offset, bufs.read_bufs()), false),
            Op::Write { offset, fua } => (node.write(offset, bufs.write_bufs()), fua),
            Op::Flush => (node.flush(), false),
            Op::Discard { offset, len } => (node.discard(offset, len), false),
            Op::WriteZeroes { offset, len, unmap, fua } => {
                (node.write_zeroes(offset, len, unmap), fua)
            }
        };
        if fua { result.and_then(|()| node.flush()) } else { result }
    });
    Completion { id, result, bufs }
}

/// Makes a panic an error, so that the request is completed all the same: its owner waits for that.
fn caught(what: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(what)).unwrap_or_else(|_| {
        Err(Error::Io {
            operation: "carry out a disk request",
            filename: String::new(),
            offset: 0,
            source: io::Error::other("internal error: its thread panicked"),
        })
    })
}

/// One result for each of several requests that were carried out together.
fn each(result: Result<()>, count: usize) -> Vec<Result<()>> {
    let mut out = Vec::with_capacity(count);
    if let Err(e) = &result {
        let again = |_| {
            Err(Error::Io {
                operation: "flush",
                filename: String::new(),
                offset: 0,
                source: io::Error::from_raw_os_error(e.errno()),
            })
        };
        out.extend((1..count).map(again));
    } else {
        out.extend((1..count).map(|_| Ok(())));
    }
    out.push(result);
    out
}
