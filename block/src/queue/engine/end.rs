//! Completions, and the requests that can start because of them.

use std::io;

use super::super::located::Located;
use super::super::transfer::{Step, Transfer};
use super::super::{Completion, Op, OwnedBufs};
use super::active::Active;
use super::threads::each;
use super::{Done, Engine, MAX_JOBS, MAX_SPARE};
use crate::Result;

impl Engine {
    /// Takes what has ended, and starts what could not be started before.
    pub(in crate::queue) fn collect(&mut self) {
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
        self.flush_durable();
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
            Done::Durable(completions) => {
                self.threads -= 1;
                self.flushing = false;
                self.completed.extend(completions);
            }
            Done::AskRing => self.threads -= 1,
        }
    }

    pub(super) fn transfer_failed(&mut self, transfer: Transfer, e: io::Error) {
        let error = transfer.error(e);
        self.transfer_ended(transfer, Err(error));
    }

    pub(super) fn transfer_ended(&mut self, transfer: Transfer, result: Result<()>) {
        match result {
            // Each part again by itself, so that only those fail that have to.
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

    pub(super) fn part_ended(&mut self, key: usize, result: Result<()>) {
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
            active.note();
            if fua && active.result.is_ok() {
                // Others need not wait for the flush.
                active.located.clear();
                self.durable.push(active);
                return;
            }
        }
        let located = std::mem::take(&mut active.located);
        self.spare(located);
        let result = std::mem::replace(&mut active.result, Ok(()));
        self.completed.push(active.complete(result));
    }

    pub(super) fn spare(&mut self, mut located: Located) {
        located.clear();
        if self.spare_located.len() < MAX_SPARE {
            self.spare_located.push(located);
        }
    }
}
