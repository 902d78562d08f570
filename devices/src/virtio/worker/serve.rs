//! Serving requests: taking them out of the queues, and giving them back.

use std::sync::atomic::Ordering;

use super::thread::Thread;
use crate::virtio::chain::Malformed;
use crate::virtio::queue::RunningQueue;
use crate::virtio::{End, Ended, Served, Token};

/// Requests served from one queue before the others get their turn.
const BATCH: usize = 64;

impl Thread {
    /// Whether requests wait for a Resume, and so all others do. Thus there are never more of them than
    /// were under way when the first one failed.
    pub(super) fn holds(&self) -> bool {
        self.queues.iter().flatten().any(RunningQueue::holds)
    }

    pub(super) fn serve_pending(&mut self) {
        for index in 0..self.pending.len() {
            if self.command_waits() || self.holds() || self.handler.is_full() {
                return;
            }
            let Some(pending) = self.pending.get_mut(index) else {
                return;
            };
            if !std::mem::take(pending) || self.broken {
                continue;
            }
            match self.serve_queue(index) {
                Ok(more) => {
                    if let Some(pending) = self.pending.get_mut(index) {
                        *pending = more;
                    }
                }
                Err(error) => self.broke_a_rule(index, &error),
            }
        }
    }

    fn broke_a_rule(&mut self, queue: usize, error: &Malformed) {
        tracing::warn!(
            device = self.device,
            queue,
            %error,
            "driver broke a rule, device needs reset"
        );
        self.break_down();
    }

    /// Serves what is held, from its chains in guest memory: they are the guest's, and may be others now.
    pub(super) fn serve_held(&mut self) {
        for index in 0..self.queues.len() {
            let Some(Some(queue)) = self.queues.get_mut(index) else { continue };
            for head in queue.take_held() {
                if self.broken {
                    return;
                }
                if let Err(error) = self.serve_again(index, head) {
                    self.broke_a_rule(index, &error);
                }
            }
        }
    }

    fn serve_again(&mut self, index: usize, head: u16) -> std::result::Result<(), Malformed> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(()) };
        queue.reload(&self.mem, head, &mut self.chain)?;
        let token = Token { queue: index, head };
        if let Served::Done(len) = self.handler.serve(token, &self.mem, &mut self.chain)?
            && queue.give_back(&self.mem, head, len)?
        {
            self.signals.request_done();
        }
        Ok(())
    }

    /// Serves a batch; true if there may be more.
    fn serve_queue(&mut self, index: usize) -> std::result::Result<bool, Malformed> {
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            return Ok(false);
        };
        queue.disable_notifications(&self.mem)?;
        for _ in 0..BATCH {
            // The same as `command_waits`, which would borrow all of self.
            if self.waiting.load(Ordering::Acquire) > 0 || self.handler.is_full() {
                return Ok(true);
            }
            let Some(head) = queue.pop(&self.mem, &mut self.chain)? else {
                return queue.enable_notifications(&self.mem);
            };
            let token = Token { queue: index, head };
            if let Served::Done(len) = self.handler.serve(token, &self.mem, &mut self.chain)?
                && queue.give_back(&self.mem, head, len)?
            {
                self.signals.request_done();
            }
        }
        Ok(true)
    }

    /// Gives requests that ended later back to the driver. With `all` it waits for all of them.
    pub(super) fn give_back_ended(&mut self, all: bool) {
        let mut ended = std::mem::take(&mut self.ended);
        self.handler.ended(all, &self.mem, &mut ended);
        let mut wanted = false;
        for Ended { token: Token { queue, head }, end } in ended.drain(..) {
            // A driver that broke a rule gets nothing back before it resets.
            let (Some(Some(ring)), false) = (self.queues.get_mut(queue), self.broken) else {
                continue;
            };
            let len = match end {
                End::Done(len) => len,
                End::Held => {
                    ring.hold(head);
                    continue;
                }
            };
            match ring.give_back(&self.mem, head, len) {
                Ok(interrupt) => wanted |= interrupt,
                Err(error) => self.broke_a_rule(queue, &error),
            }
        }
        if wanted {
            self.signals.request_done();
        }
        self.ended = ended;
    }

    fn command_waits(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    pub(super) fn break_down(&mut self) {
        self.broken = true;
        self.signals.needs_reset_now();
    }
}
