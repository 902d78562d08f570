//! What the thread does besides serving requests: it obeys commands and waits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::{Command, HANDLER, Positions, Reply, RunningQueues};
use crate::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::queue::RunningQueue;
use crate::virtio::signals::Signals;
use crate::virtio::{Ended, QueueHandler};

/// The thread's own state.
pub(super) struct Thread {
    pub(super) device: String,
    pub(super) epoll: Epoll,
    pub(super) kicks: Vec<EventFd>,
    pub(super) wake: EventFd,
    pub(super) commands: Receiver<Command>,
    pub(super) replies: Sender<Reply>,
    pub(super) waiting: Arc<AtomicUsize>,
    /// Queues to look at without waiting for a kick.
    pub(super) pending: Vec<bool>,
    pub(super) queues: RunningQueues,
    pub(super) chain: Chain,
    pub(super) handler: Box<dyn QueueHandler>,
    pub(super) ended: Vec<Ended>,
    pub(super) mem: GuestMemory,
    pub(super) signals: Arc<Signals>,
    pub(super) parked: bool,
    /// The driver broke a rule; queues stay alone until it resets.
    pub(super) broken: bool,
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

impl Thread {
    pub(super) fn run(mut self) {
        loop {
            if self.obey() == Next::End {
                return;
            }
            if let Err(error) = self.wait() {
                // Not a thing the driver can cause or anyone can repair.
                tracing::error!(device = self.device, %error, "device thread cannot wait");
                self.break_down();
                self.parked = true;
                continue;
            }
            self.serve_pending();
            self.give_back_ended(false);
        }
    }

    /// Carries out the commands that wait; while parked, waits for more.
    fn obey(&mut self) -> Next {
        loop {
            let command = if self.parked {
                // An error is a machine that dropped its end.
                match self.commands.recv() {
                    Ok(command) => command,
                    Err(_) => return Next::End,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty) => return Next::GoOn,
                    Err(TryRecvError::Disconnected) => return Next::End,
                }
            };
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            if self.carry_out(command) == Next::End {
                return Next::End;
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> Next {
        if matches!(command, Command::Look) {
            // It goes through all of its loop next; a parked thread does when it is resumed.
            return Next::GoOn;
        }
        self.give_back_ended(true);
        let reply = match command {
            Command::Activate { queues, features } => {
                self.handler.start(features);
                self.queues = queues;
                self.broken = false;
                self.look_at_all();
                return Next::GoOn;
            }
            Command::Resume => {
                self.parked = false;
                self.handler.resumed();
                self.serve_held();
                self.look_at_all();
                return Next::GoOn;
            }
            Command::Deactivate => {
                self.queues = Vec::new();
                self.broken = false;
                Reply::Done
            }
            Command::StopQueue(index) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    *queue = None;
                }
                // The others may have waited for what it held.
                self.look_at_all();
                Reply::Done
            }
            Command::Pause => {
                self.parked = true;
                Reply::Parked(self.positions())
            }
            Command::Look => return Next::GoOn,
            Command::Stop => {
                let flushed = self.handler.flush();
                self.answer(Reply::Stopped(flushed));
                return Next::End;
            }
        };
        self.answer(reply);
        Next::GoOn
    }

    fn answer(&self, reply: Reply) {
        // The asker is gone only if the machine is: the next recv ends the thread.
        let _ = self.replies.send(reply);
    }

    fn look_at_all(&mut self) {
        self.pending.fill(true);
    }

    fn positions(&self) -> Positions {
        self.queues.iter().map(|q| q.as_ref().map(RunningQueue::position)).collect()
    }

    /// Milliseconds to wait at most; -1 for no end.
    fn timeout(&self) -> i32 {
        if self.pending.contains(&true) && !self.holds() && !self.handler.is_full() {
            return 0;
        }
        let Some(wait) = self.handler.wait() else { return -1 };
        // Rounded up, or the last millisecond would be spent spinning.
        i32::try_from(wait.as_millis()).unwrap_or(i32::MAX).saturating_add(1)
    }

    /// Waits for a kick or a command, unless a queue has more to do.
    fn wait(&mut self) -> io::Result<()> {
        let timeout = self.timeout();
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(timeout, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for event in events.iter().take(count) {
            if event.data() == HANDLER {
                // Cleared when the requests that have ended are given back.
                continue;
            }
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let fd = self.kicks.get(index).unwrap_or(&self.wake);
            match fd.read() {
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                _ => {}
            }
            if let Some(pending) = self.pending.get_mut(index) {
                *pending = true;
            }
        }
        Ok(())
    }
}
