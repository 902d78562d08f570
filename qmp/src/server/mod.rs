//! The monitors: sockets and standard input and output, any number of clients, one thread.
//!
//! One thread serves all listeners and clients over non-blocking sockets. It never runs a command:
//! a [`Request`] goes to the machine's own thread through [`Requests`], and the answer comes back
//! through its [`Reply`] from any thread. Answers and events take one queue, so that every client
//! sees them in the order in which they were given (STOP before the reply to `stop`).
//!
//! What a client can make us hold is bounded, see [`Options`]. A client that does not read is not
//! read from, and loses its connection once too many events wait for it; the others do not notice.

mod chardevs;
mod connection;
mod limit;
mod outbox;
mod output;
mod place;
mod poll;
mod session;
mod socket;
mod stdio;
mod stream;

use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::json::Limits;
use crate::schema::{ChardevInfo, Command, QmpCapability, VersionInfo};
use chardevs::Chardevs;
use connection::Machine;
pub use outbox::{Events, Reply};
use outbox::{Outbox, Output};
pub use place::Place;
use poll::Poll;
pub use socket::ListenError;
use socket::Listener;
use stream::Stream;

/// What the greeting offers.
pub(crate) const CAPABILITIES: &[QmpCapability] = &[QmpCapability::Oob];

/// How the monitors behave.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the greeting and `query-version` say.
    pub version: VersionInfo,
    /// The largest request.
    pub limits: Limits,
    /// Clients at once. Further ones wait, without a greeting, until one leaves.
    pub clients: usize,
    /// Bytes of events that may wait for a client to read them; one beyond closes the connection.
    pub unread: usize,
    /// How long a shutdown waits for clients to read their last answers.
    pub linger: Duration,
    /// Commands of the schema that are not there: unknown to clients, and not listed.
    pub without: &'static [&'static str],
}

impl Options {
    /// The usual limits, and this version.
    pub fn new(version: VersionInfo) -> Self {
        Self {
            version,
            limits: Limits::default(),
            clients: 64,
            unread: 8 << 20,
            linger: Duration::from_secs(1),
            without: &[],
        }
    }
}

/// One client's session. Not used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MonitorId(u64);

/// A command for the machine.
#[derive(Debug)]
pub struct Request {
    /// Who asked.
    pub monitor: MonitorId,
    /// What, with arguments of the right types.
    pub command: Command,
    /// Where the answer goes. The client's next command comes after it.
    pub reply: Reply,
}

/// The queue of requests, for the thread that runs commands.
#[derive(Debug)]
pub struct Requests {
    queue: mpsc::Receiver<Request>,
    event: EventFd,
}

impl Requests {
    /// Readable when there may be a request; for an event loop. [`Requests::take`] resets it.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// All requests that there are now, without blocking.
    pub fn take(&self) -> Vec<Request> {
        // Cleared before the queue is emptied: the other way round, a request that came in between
        // would lie unnoticed. It fails where nothing was signalled, which is no error here.
        let _ = self.event.read();
        self.queue.try_iter().collect()
    }

    /// The next request, waiting for it at most so long.
    pub fn wait(&self, timeout: Duration) -> Option<Request> {
        self.queue.recv_timeout(timeout).ok()
    }
}

/// The monitors and their thread. Dropping it is a [`Server::shutdown`].
#[derive(Debug)]
pub struct Server {
    outbox: Outbox,
    chardevs: Chardevs,
    thread: Option<JoinHandle<()>>,
    linger: Duration,
    /// Of the monitor on standard input and output.
    stdio: Option<stdio::Carriers>,
}

impl Server {
    /// Starts the thread, without any listener yet.
    ///
    /// # Errors
    /// When file descriptors or the thread cannot be had.
    pub fn start(options: Options) -> io::Result<(Self, Requests)> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (sender, queue) = mpsc::channel();
        let (outbox, outputs) = Outbox::new()?;
        let linger = options.linger;
        let chardevs = Chardevs::default();
        let machine =
            Machine { requests: sender, event: event.try_clone()?, outbox: outbox.clone() };
        let poll = Poll::new(options, outputs, machine, chardevs.clone())?;
        let thread = std::thread::Builder::new().name("qmp".into()).spawn(|| poll.run())?;
        let server = Self { outbox, chardevs, thread: Some(thread), linger, stdio: None };
        Ok((server, Requests { queue, event }))
    }

    /// Listens on a Unix socket at `path`, mode 0600. A socket that no one listens on is replaced.
    /// The file is removed at shutdown.
    ///
    /// # Errors
    /// When another process listens there, or `path` is something else, or cannot be made.
    pub fn listen(&self, path: &Path) -> Result<(), ListenError> {
        self.listen_at(&Place::Unix(path.to_owned()), false)
    }

    /// Listens at a place. With `wait` this returns only when the first client is there; only a
    /// signal with its default action ends the wait.
    ///
    /// # Errors
    /// As [`Server::listen`]; when others than this host could connect; when waiting fails.
    pub fn listen_at(&self, place: &Place, wait: bool) -> Result<(), ListenError> {
        let listener = Listener::bind(place)?;
        let first = if wait { Some(listener.wait_for_client()?) } else { None };
        let chardev = self.chardevs.add(chardevs::Kind::listening(&listener));
        self.outbox.send(Output::Listen { listener, first, chardev });
        Ok(())
    }

    /// Serves the one who listens at a place (`server=off`), until it ends the connection.
    ///
    /// # Errors
    /// When no one listens there.
    pub fn connect_to(&self, place: &Place) -> Result<(), ListenError> {
        let stream = place.connect()?;
        let chardev = self.chardevs.add(chardevs::Kind::Socket(place.address()));
        self.outbox.send(Output::Serve(stream, chardev));
        Ok(())
    }

    /// Serves who is at standard input and output. Once.
    ///
    /// # Errors
    /// When descriptors or threads cannot be had.
    pub fn serve_stdio(&mut self) -> io::Result<()> {
        let (stream, carriers) = stdio::carry(self.linger)?;
        self.stdio = Some(carriers);
        let chardev = self.chardevs.add(chardevs::Kind::Stdio);
        self.outbox.send(Output::Serve(Stream::Unix(stream), chardev));
        Ok(())
    }

    /// As [`Server::listen`], and returns only when the first client is there (`wait=on`). Only a
    /// signal with its default action ends the wait.
    ///
    /// # Errors
    /// As [`Server::listen`], and when waiting fails.
    pub fn listen_and_wait(&self, path: &Path) -> Result<(), ListenError> {
        self.listen_at(&Place::Unix(path.to_owned()), true)
    }

    /// The monitors, for `query-chardev`.
    pub fn chardevs(&self) -> Vec<ChardevInfo> {
        self.chardevs.infos()
    }

    /// A handle to tell events to the clients.
    pub fn events(&self) -> Events {
        Events::new(self.outbox.clone())
    }

    /// Stops listening and reading at once, sends what was answered and told so far, and closes all
    /// connections; clients that do not read get no more than [`Options::linger`].
    pub fn shutdown(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.outbox.send(Output::Shutdown);
            if thread.join().is_err() {
                tracing::error!("the QMP thread has panicked");
            }
            self.stdio = None;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown();
    }
}
