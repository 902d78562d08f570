//! The start of requests.

use std::sync::Arc;

use super::super::located::{Extent, Located, Place};
use super::super::transfer::{Step, Transfer};
use super::super::{Op, Request};
use super::active::{Active, locate};
use super::{Engine, MAX_TRIES, THREAD_WRITE, Work};
use crate::node::Entered;
use crate::storage::Aio;

impl Engine {
    /// Starts requests, all of which are carried out on the image as it is now.
    pub(in crate::queue) fn start_all(&mut self, requests: impl Iterator<Item = Request>) {
        self.try_all(requests.map(|request| (request, 0)));
    }

    /// As [`Engine::start_all`], for requests that were tried so many times before.
    pub(super) fn try_all(&mut self, requests: impl Iterator<Item = (Request, u8)>) {
        // While the image is being replaced, threads wait in our place.
        let access = self.link.try_enter().map(Arc::new);
        let busy = self.busy;
        let mut requests = requests.peekable();
        while let Some((request, tries)) = requests.next() {
            self.busy = busy || requests.peek().is_some();
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
        self.flush_durable();
    }

    fn start(&mut self, request: Request, tries: u8, access: &Arc<Entered>) {
        if intercepted(&request, access) || detects_zeroes(&request, access) {
            // The thread's write finds out again, and may wait for what others do before it.
            return self.give_to_thread(Work::Request(request));
        }
        // Its changes are told when they complete: `Active::note`.
        let image = access.access().format();
        let mut located = self.spare_located.pop().unwrap_or_default();
        let mut found = locate(image, &request, &mut located);
        if !found && located.conflict && self.run.is_some() {
            // Perhaps with what is being joined.
            self.flush_run();
            located.clear();
            found = locate(image, &request, &mut located);
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

    /// Starts the transfers of a located request.
    fn transfer(&mut self, request: Request, mut located: Located, access: &Arc<Entered>) {
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
    pub(super) fn flush_run(&mut self) {
        if let Some(run) = self.run.take() {
            self.begin(run);
        }
    }

    /// Starts a transfer: at once if the page cache can do it and the owner has time, else on the ring or by a thread.
    pub(super) fn begin(&mut self, mut transfer: Transfer) {
        transfer.close();
        if self.busy && transfer.write && transfer.buffered_len() >= THREAD_WRITE {
            return self.give_write(transfer);
        }
        match transfer.inline() {
            Step::Done => self.transfer_ended(transfer, Ok(())),
            Step::Failed(e) => self.transfer_failed(transfer, e),
            Step::Again => self.begin_waiting(transfer),
        }
    }

    /// Starts a transfer that waits for the disk.
    pub(super) fn begin_waiting(&mut self, transfer: Transfer) {
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

    pub(super) fn push_to_ring(&mut self, key: usize) {
        let (Some(ring), Some(transfer)) = (&mut self.ring, self.transfers.get(key)) else {
            return;
        };
        let Some(file) = transfer.file() else {
            return;
        };
        let (fd, _, iovs, offset) = transfer.next(file);
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
}

/// Whether a request is a write that others have to act before. It stays so while `entered` is held.
fn intercepted(request: &Request, entered: &Entered) -> bool {
    matches!(request.op, Op::Write { .. }) && entered.node().intercepted()
}

/// Whether a request is a write that is to become one of zeroes.
fn detects_zeroes(request: &Request, entered: &Entered) -> bool {
    matches!(request.op, Op::Write { .. })
        && entered.node().zeroes_to_detect(request.bufs.write_bufs()).is_some()
}
