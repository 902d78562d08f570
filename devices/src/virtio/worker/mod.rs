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

mod serve;
mod thread;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::chain::Chain;
use super::error::{Error, Result};
use super::queue::{Position, RunningQueue};
use super::signals::Signals;
use crate::GuestMemory;
use crate::interrupt::signal;
use thread::Thread;

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
