//! What threads do in the owner's place.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::pool::{REQUESTS, TRANSFERS};
use super::super::transfer::Transfer;
use super::super::{Completion, Op, Request};
use super::active::Active;
use super::{Done, Engine, MAX_JOBS, Work};
use crate::{Error, Link, Result};

impl Engine {
    pub(super) fn give_transfer(&mut self, transfer: Transfer) {
        self.threads += 1;
        let hand_over = self.hand_over.clone();
        TRANSFERS.run(Box::new(move || {
            let result = caught(|| transfer.wait());
            hand_over.put(Done::Transfer(transfer, result));
        }));
    }

    /// Has a write done beside the owner, after those given before it: two at once would only wait for
    /// each other, because a file system does the buffered writes of a file one after another.
    pub(super) fn give_write(&mut self, transfer: Transfer) {
        self.threads += 1;
        let (writes, hand_over) = (self.writes.clone(), self.hand_over.clone());
        if !writes.push(transfer) {
            return;
        }
        TRANSFERS.run(Box::new(move || {
            while let Some(transfer) = writes.next() {
                let result = caught(|| transfer.wait());
                hand_over.put(Done::Transfer(transfer, result));
            }
        }));
    }

    /// Has a write finished by a thread that may wait for the metadata lock. It is one of those for
    /// transfers, because it holds a range that requests may be waiting for.
    pub(super) fn give_finish(&mut self, mut active: Active) {
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

    /// Writes that wait for a flush which has not begun.
    #[cfg(test)]
    pub(in crate::queue) fn waiting_for_flush(&self) -> usize {
        self.durable.len()
    }

    /// Has the located writes made durable that wait for it, by one flush for all. Those that come
    /// while it is under way wait for the next: it may have begun before they were written.
    ///
    /// Not by the threads for requests: all of these may wait at a gate that closes once these writes'
    /// access has ended.
    pub(super) fn flush_durable(&mut self) {
        if self.flushing || self.durable.is_empty() {
            return;
        }
        self.flushing = true;
        self.threads += 1;
        let waiting = std::mem::take(&mut self.durable);
        let hand_over = self.hand_over.clone();
        TRANSFERS.run(Box::new(move || {
            // The image is the same for all: it is not replaced while one of them has its access.
            let result =
                caught(|| waiting.first().map_or(Ok(()), |first| first.access.access().flush()));
            let results = each(result, waiting.len());
            let ended = waiting.into_iter().zip(results);
            let ended = ended.map(|(active, result)| active.complete(result)).collect();
            hand_over.put(Done::Durable(ended));
        }));
    }

    pub(super) fn give_to_thread(&mut self, work: Work) {
        if self.jobs >= MAX_JOBS {
            self.waiting.push_back(work);
            return;
        }
        self.jobs += 1;
        let link = self.link.clone();
        let hand_over = self.hand_over.clone();
        REQUESTS.run(Box::new(move || {
            let done = match work {
                Work::Request(request) => Done::Request(execute(&link, request)),
                Work::Flush(ids) => Done::Flush(ids, caught(|| link.flush())),
            };
            // The owner may be the last to let the node go, once it has the completion.
            drop(link);
            hand_over.put(done);
        }));
    }
}

/// Carries out a request, waiting for it.
fn execute(link: &Link, request: Request) -> Completion {
    let Request { id, op, mut bufs } = request;
    let result = caught(|| match op {
        Op::Read { offset } => link.read(offset, bufs.read_bufs()),
        Op::Write { offset, fua } => link.write(offset, bufs.write_bufs(), fua),
        Op::Flush => link.flush(),
        Op::Discard { offset, len } => link.discard(offset, len),
        Op::WriteZeroes { offset, len, unmap, fua } => link.write_zeroes(offset, len, unmap, fua),
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
pub(super) fn each(result: Result<()>, count: usize) -> Vec<Result<()>> {
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
