//! A queue while the device runs: virtio-queue's split ring, with its registers checked and its
//! chains read strictly.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainRules, Malformed, in_memory, out_of_memory};
use super::state::QueueState;
use crate::GuestMemory;

/// Why the registers of a ready queue are no queue.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("size {0} is not a power of two from 1 to the device's maximum")]
    Size(u32),
    #[error("{0}")]
    Alignment(virtio_queue::Error),
    #[error("{ring} of {len} bytes at {addr:#x} is not in guest memory")]
    Address { ring: &'static str, addr: u64, len: u32 },
    #[error("{0} requests wait to be served again, which is more than it has descriptors")]
    Held(usize),
}

/// A queue whose rings are in guest memory and aligned.
pub(super) struct RunningQueue {
    ring: Queue,
    rules: ChainRules,
    /// First descriptors of requests that are to be served again.
    held: Vec<u16>,
}

/// Where a queue is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    pub(super) held: Vec<u16>,
}

impl RunningQueue {
    /// Builds the queue from its registers. `features` are those the driver accepted.
    pub(super) fn new(
        state: &QueueState,
        features: u64,
        mem: &GuestMemory,
    ) -> Result<Self, QueueError> {
        let bad_size = || QueueError::Size(state.size);
        let size = u16::try_from(state.size).map_err(|_| bad_size())?;
        let mut ring = Queue::new(state.max_size).map_err(|_| bad_size())?;
        ring.try_set_size(size).map_err(|_| bad_size())?;
        check_rings(state, size, mem)?;
        if state.held.len() > usize::from(size) {
            return Err(QueueError::Held(state.held.len()));
        }
        ring.try_set_desc_table_address(GuestAddress(state.desc_table))
            .map_err(QueueError::Alignment)?;
        ring.try_set_avail_ring_address(GuestAddress(state.avail_ring))
            .map_err(QueueError::Alignment)?;
        ring.try_set_used_ring_address(GuestAddress(state.used_ring))
            .map_err(QueueError::Alignment)?;
        ring.set_next_avail(state.next_avail);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        ring.set_ready(true);
        let rules = ChainRules {
            desc_table: state.desc_table,
            size,
            max_len: state.max_size,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
        };
        Ok(Self { ring, rules, held: state.held.clone() })
    }

    /// Where it is.
    pub(super) fn position(&self) -> Position {
        let (next_avail, next_used) = (self.ring.next_avail(), self.ring.next_used());
        Position { next_avail, next_used, held: self.held.clone() }
    }

    /// Keeps a request to be served again.
    pub(super) fn hold(&mut self, head: u16) {
        self.held.push(head);
    }

    /// Whether requests are to be served again.
    pub(super) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes the requests that are to be served again, oldest first.
    pub(super) fn take_held(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.held)
    }

    /// Reads the chain of a request that was taken before.
    pub(super) fn reload(
        &self,
        mem: &GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), Malformed> {
        chain.load(mem, &self.rules, head)
    }

    /// Takes the next request, reads its chain into `chain` and returns its head.
    pub(super) fn pop(
        &mut self,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<Option<u16>, Malformed> {
        let lost = self.ring_lost();
        let mut available = self.ring.iter(mem).map_err(|e| match e {
            virtio_queue::Error::InvalidAvailRingIndex => Malformed::AvailIndex,
            _ => lost,
        })?;
        let Some(taken) = available.next() else {
            return Ok(None);
        };
        let head = taken.head_index();
        chain.load(mem, &self.rules, head)?;
        Ok(Some(head))
    }

    /// Gives a request back with `len` bytes written, and says whether the driver wants an
    /// interrupt for it.
    pub(super) fn give_back(
        &mut self,
        mem: &GuestMemory,
        head: u16,
        len: u32,
    ) -> Result<bool, Malformed> {
        self.ring
            .add_used(mem, head, len)
            .and_then(|()| self.ring.needs_notification(mem))
            .map_err(|_| self.ring_lost())
            .and_then(|wanted| Ok(wanted && !self.interrupts_suppressed(mem)?))
    }

    /// Without VIRTIO_F_EVENT_IDX a driver says by a flag that it polls (section 2.7.7).
    fn interrupts_suppressed(&self, mem: &GuestMemory) -> Result<bool, Malformed> {
        if self.ring.event_idx_enabled() {
            return Ok(false);
        }
        let flags: u16 = mem
            .load(GuestAddress(self.ring.avail_ring()), Ordering::Acquire)
            .map_err(|_| self.ring_lost())?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    /// Tells the driver that notifications are not needed while we look anyway.
    pub(super) fn disable_notifications(&mut self, mem: &GuestMemory) -> Result<(), Malformed> {
        self.ring.disable_notification(mem).map_err(|_| self.ring_lost())
    }

    /// Asks for notifications again; true if requests came meanwhile and must be looked at.
    pub(super) fn enable_notifications(&mut self, mem: &GuestMemory) -> Result<bool, Malformed> {
        self.ring.enable_notification(mem).map_err(|_| self.ring_lost())
    }

    fn ring_lost(&self) -> Malformed {
        out_of_memory(GuestAddress(self.ring.avail_ring()), 0)
    }
}

/// All three parts must be in memory (sizes from section 2.7).
fn check_rings(state: &QueueState, size: u16, mem: &GuestMemory) -> Result<(), QueueError> {
    let size = u32::from(size);
    let rings = [
        ("descriptor table", state.desc_table, 16 * size),
        ("available ring", state.avail_ring, 6 + 2 * size),
        ("used ring", state.used_ring, 6 + 8 * size),
    ];
    for (ring, addr, len) in rings {
        // virtio-queue takes an available ring at 0 for a queue that was never set up.
        if addr == 0 && ring == "available ring" || !in_memory(mem, GuestAddress(addr), len) {
            return Err(QueueError::Address { ring, addr, len });
        }
    }
    Ok(())
}
