//! The thread of a device: owner of its running queues.
//!
//! ```text
//!            Activate: queues come          Deactivate: queues go
//!   running ──Pause──> parked ──Resume──> running       Stop, from both: flush, end
//! ```
//!
//! A running thread waits in epoll for its queues' eventfds and the control eventfd; a parked one
//! waits on the control channel alone. Between any two requests it looks whether a command waits.
//! A command that takes queues away or parks the thread waits until every request that was taken
//! has ended and is back in its ring, or is held: afterwards no ring and no guest memory is touched.
//!
//! A request that the handler holds waits for the next Resume; until then the thread takes no others.
//! Whoever made the handler sees to it that the machine stops, so that there is one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Malformed};
use super::error::{Error, Result};
use super::queue::{Position, RunningQueue};
use super::signals::Signals;
use super::{End, Ended, QueueHandler, Served, Token, VirtioDevice};
use crate::GuestMemory;
use crate::interrupt::signal;

/// Requests served from one queue before the others get their turn.
const BATCH: usize = 64;

/// Where the queues that run are, by index.
pub(super) type Positions = Vec<Option<Position>>;

/// Queues by index; None is a queue the driver does not use.
pub(super) type RunningQueues = Vec<Option<RunningQueue>>;

enum Command {
    Activate { queues: RunningQueues, features: u64 },
    Deactivate,
    StopQueue(usize),
    Pause,
    Resume,
    Look,
    Stop,
}

enum Reply {
    Done,
    Parked(Positions),
    Stopped(::block::Result<()>),
}

/// The machine's end of a device's thread.
pub(super) struct Worker {
    device: String,
    commands: Sender<Command>,
    replies: Receiver<Reply>,
    wake: EventFd,
    waiting: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, running and without queues. `kicks` are the queues' eventfds.
    pub(super) fn start(
        device: &dyn VirtioDevice,
        mem: GuestMemory,
        signals: Arc<Signals>,
        kicks: &[EventFd],
    ) -> Result<Self> {
        let name = device.name().to_owned();
        let setup = |what| {
            let device = name.clone();
            move |source| Error::Setup { device, what, source }
        };
        let wake = new_event().map_err(setup("an eventfd"))?;
        let (commands, command_receiver) = channel();
        let (reply_sender, replies) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let handler = device
            .handler()
            .map_err(|e| setup("a request queue")(io::Error::from_raw_os_error(e.errno())))?;
        let epoll = watch(kicks, &wake, handler.event()).map_err(setup("epoll"))?;
        let thread = Thread {
            device: name.clone(),
            epoll,
            kicks: clone_all(kicks).map_err(setup("an eventfd"))?,
            wake: wake.try_clone().map_err(setup("an eventfd"))?,
            commands: command_receiver,
            replies: reply_sender,
            waiting: waiting.clone(),
            pending: vec![false; kicks.len()],
            queues: Vec::new(),
            chain: Chain::default(),
            handler,
            ended: Vec::new(),
            mem,
            signals,
            parked: false,
            broken: false,
        };
        let handle = std::thread::Builder::new()
            .name(thread_name(&name))
            .spawn(move || thread.run())
            .map_err(setup("a thread"))?;
        Ok(Self { device: name, commands, replies, wake, waiting, thread: Some(handle) })
    }

    /// Gives the thread its queues. Does not wait.
    pub(super) fn activate(&self, queues: RunningQueues, features: u64) -> Result<()> {
        self.send(Command::Activate { queues, features })
    }

    /// Takes all queues away; no ring is touched afterwards.
    pub(super) fn deactivate(&self) -> Result<()> {
        self.ask(Command::Deactivate).map(|_| ())
    }

    /// Takes one queue away; its ring is not touched afterwards.
    pub(super) fn stop_queue(&self, index: usize) -> Result<()> {
        self.ask(Command::StopQueue(index)).map(|_| ())
    }

    /// Parks the thread and returns where its queues are.
    pub(super) fn pause(&self) -> Result<Positions> {
        match self.ask(Command::Pause)? {
            Reply::Parked(positions) => Ok(positions),
            _ => Err(self.ended()),
        }
    }

    /// Lets a parked thread run, looking at every queue once, after what is held. Does not wait.
    pub(super) fn resume(&self) -> Result<()> {
        self.send(Command::Resume)
    }

    /// Has the thread look at everything, as what it waits for may have changed. Does not wait.
    pub(super) fn look(&self) -> Result<()> {
        self.send(Command::Look)
    }

    /// Flushes the device and ends the thread. A second call does nothing.
    pub(super) fn stop(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let reply = self.ask(Command::Stop);
        if thread.join().is_err() {
            return Err(self.ended());
        }
        match reply? {
            Reply::Stopped(Ok(())) => Ok(()),
            Reply::Stopped(Err(source)) => {
                Err(Error::Flush { device: self.device.clone(), source })
            }
            _ => Err(self.ended()),
        }
    }

    fn send(&self, command: Command) -> Result<()> {
        // Counted before it is sent: the thread must not find a command it has no count for.
        self.waiting.fetch_add(1, Ordering::AcqRel);
        self.commands.send(command).map_err(|_| self.ended())?;
        signal(&self.wake).map_err(|source| Error::Setup {
            device: self.device.clone(),
            what: "its thread's attention",
            source,
        })
    }

    fn ask(&self, command: Command) -> Result<Reply> {
        self.send(command)?;
        self.replies.recv().map_err(|_| self.ended())
    }

    fn ended(&self) -> Error {
        Error::ThreadEnded { device: self.device.clone() }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "device was not stopped cleanly");
        }
    }
}

/// A non-blocking eventfd.
pub(super) fn new_event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn clone_all(fds: &[EventFd]) -> io::Result<Vec<EventFd>> {
    fds.iter().map(EventFd::try_clone).collect()
}

/// Marks the event of the handler in epoll.
const HANDLER: u64 = u64::MAX;

/// Epoll over the queues' eventfds, with their index as data, the control eventfd behind them, and
/// the handler's event.
fn watch(kicks: &[EventFd], wake: &EventFd, handler: Option<BorrowedFd<'_>>) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let events = kicks.iter().chain([wake]).map(AsRawFd::as_raw_fd).zip(0..);
    for (fd, data) in events.chain(handler.map(|fd| (fd.as_raw_fd(), HANDLER))) {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data))?;
    }
    Ok(epoll)
}

fn thread_name(device: &str) -> String {
    // A zero byte would end the name early, and std refuses it.
    let mut name: String = device.chars().filter(|c| *c != '\0').collect();
    name.push_str("-io");
    name
}

/// The thread's own state.
struct Thread {
    device: String,
    epoll: Epoll,
    kicks: Vec<EventFd>,
    wake: EventFd,
    commands: Receiver<Command>,
    replies: Sender<Reply>,
    waiting: Arc<AtomicUsize>,
    /// Queues to look at without waiting for a kick.
    pending: Vec<bool>,
    queues: RunningQueues,
    chain: Chain,
    handler: Box<dyn QueueHandler>,
    ended: Vec<Ended>,
    mem: GuestMemory,
    signals: Arc<Signals>,
    parked: bool,
    /// The driver broke a rule; queues stay alone until it resets.
    broken: bool,
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

impl Thread {
    fn run(mut self) {
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
                    Err(std::sync::mpsc::TryRecvError::Empty) => return Next::GoOn,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => return Next::End,
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

    /// Whether requests wait for a Resume, and so all others do. Thus there are never more of them than
    /// were under way when the first one failed.
    fn holds(&self) -> bool {
        self.queues.iter().flatten().any(RunningQueue::holds)
    }

    fn serve_pending(&mut self) {
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
    fn serve_held(&mut self) {
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
            // As command_waits, which would borrow all of self.
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
    fn give_back_ended(&mut self, all: bool) {
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

    fn break_down(&mut self) {
        self.broken = true;
        self.signals.needs_reset_now();
    }
}
