//! A request that is being carried out, and its answer.

use std::collections::VecDeque;
use std::time::Instant;

use ::block::queue::Op;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{Bytes, GuestAddress};

use super::counters::IoKind;
use crate::GuestMemory;
use crate::virtio::chain::{Malformed, out_of_memory};
use crate::virtio::{Segment, Token, mark_filled};

/// Why a request fails, as its status byte tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(clippy::cast_possible_truncation, reason = "the constants are 1 and 2")]
pub(super) enum Failure {
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

pub(super) type Outcome = Result<(), Failure>;

/// What is counted when the request ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    pub(super) kind: IoKind,
    pub(super) bytes: u64,
    pub(super) started: Instant,
}

/// A request that is being carried out.
#[derive(Debug)]
pub(super) struct Pending {
    /// Where its chain goes back to.
    pub(super) token: Token,
    /// How it is counted.
    pub(super) account: Option<Account>,
    /// What is still to be done, one after another.
    pub(super) todo: VecDeque<Op>,
    /// Guest memory that the host fills past vm-memory.
    filled: Vec<Segment>,
    /// Guest physical address of the status byte.
    status: GuestAddress,
    /// Bytes that count as written if it succeeds, before the status byte.
    data: u64,
}

impl Pending {
    pub(super) fn new(token: Token, status: GuestAddress, data: u64) -> Self {
        Self { token, account: None, todo: VecDeque::new(), filled: Vec::new(), status, data }
    }

    /// The host fills these.
    pub(super) fn filling(&mut self, segments: &[Segment]) {
        self.filled = segments.to_vec();
    }

    /// It does not end now: the host may have filled some of it all the same.
    pub(super) fn leave(&self, mem: &GuestMemory) {
        mark_filled(mem, &self.filled);
    }

    /// Writes the status byte; gives the bytes that were written. Those before it count only where
    /// they surely are.
    pub(super) fn answer(&self, mem: &GuestMemory, outcome: Outcome) -> Result<u32, Malformed> {
        // Also after a failure: some of the data may be there.
        mark_filled(mem, &self.filled);
        debug_assert_eq!(VIRTIO_BLK_S_OK, 0);
        let status = outcome.map_or_else(|failure| failure as u8, |()| 0);
        mem.write_obj(status, self.status).map_err(|_| out_of_memory(self.status, 1))?;
        let data = if outcome.is_ok() { self.data } else { 0 };
        Ok(u32::try_from(data).unwrap_or(u32::MAX).saturating_add(1))
    }
}
