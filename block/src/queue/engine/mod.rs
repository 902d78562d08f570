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
//!
//! A located write with FUA waits after its `finish` for a flush, one for all that wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Once};

use slab::Slab;

use super::handover::HandOver;
use super::located::Located;
use super::ring::{Ended, Ring};
use super::transfer::{Lists, Transfer};
use super::{Completion, Request};
use crate::storage::Aio;
use crate::{Link, Node, Result};

mod active;
mod end;
mod start;
mod threads;
mod writes;

use active::Active;
use writes::Writes;

/// Requests of one queue that threads have at once; further ones wait here.
const MAX_JOBS: usize = 32;
/// Ended transfers and requests whose memory is kept for the next.
const MAX_SPARE: usize = 64;
/// Bytes of a buffered write that a thread does while the owner is busy: copying less takes about as
/// long as having it done.
const THREAD_WRITE: u64 = 64 << 10;
/// How often a request that is in the way of others is tried before a thread waits in its turn:
/// who only tries can lose against other queues for ever.
const MAX_TRIES: u8 = 8;

/// What other threads did.
#[derive(Debug)]
enum Done {
    Request(Completion),
    Flush(Vec<u64>, Result<()>),
    Transfer(Transfer, Result<()>),
    /// New places are in the tables, or given back.
    Finished(Box<Active>),
    /// Located writes are durable, or could not be made so.
    Durable(Vec<Completion>),
    /// The ring did not take what it was to start; it is to be asked again.
    AskRing,
}

/// The requests of a queue that are under way.
#[derive(Debug)]
pub(super) struct Engine {
    link: Link,
    ring: Option<Ring>,
    hand_over: HandOver<Done>,
    /// Neighbouring transfers that are being joined.
    run: Option<Transfer>,
    requests: Slab<Active>,
    /// On the ring.
    transfers: Slab<Transfer>,
    /// For the ring, once there is room.
    stalled: VecDeque<Transfer>,
    /// Large writes that a thread does.
    writes: Writes,
    /// The owner has more to do than what is being started.
    busy: bool,
    /// In the way of each other, and how often each was tried.
    blocked: Vec<(Request, u8)>,
    /// For the request threads, once there is room.
    waiting: VecDeque<Work>,
    flushes: Vec<u64>,
    /// Located writes that are done and are to be made durable.
    durable: Vec<Active>,
    /// Whether a thread makes some durable.
    flushing: bool,
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
    pub(super) fn new(link: Link) -> io::Result<Self> {
        let ring = Ring::new().inspect_err(|e| tell_no_ring(&link.node(), e)).ok();
        Ok(Self {
            link,
            ring,
            hand_over: HandOver::new()?,
            run: None,
            requests: Slab::new(),
            transfers: Slab::new(),
            stalled: VecDeque::new(),
            writes: Writes::default(),
            busy: false,
            blocked: Vec::new(),
            waiting: VecDeque::new(),
            flushes: Vec::new(),
            durable: Vec::new(),
            flushing: false,
            jobs: 0,
            threads: 0,
            completed: Vec::new(),
            spare_located: Vec::new(),
            spare_transfers: Vec::new(),
            ended: Vec::new(),
            done: Vec::new(),
        })
    }

    /// Says whether the owner has more to do than what it starts next.
    pub(super) fn set_busy(&mut self, busy: bool) {
        self.busy = busy;
    }

    /// What is readable while something has ended.
    pub(super) fn fds(&self) -> impl Iterator<Item = RawFd> {
        self.ring.iter().map(Ring::fd).chain([self.hand_over.fd()])
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
