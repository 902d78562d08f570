//! The monitors' thread.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::chardevs::Chardevs;
use super::connection::{Connection, Machine};
use super::limit::Limiter;
use super::outbox::{Output, Outputs};
use super::session::Session;
use super::socket::Listener;
use super::stream::Stream;
use super::{MonitorId, Options};
use crate::schema::VersionInfo;

/// The token of the outputs' event; listeners are 1 and up.
const OUTPUTS: u64 = 0;

/// The first client. Their tokens are never used again.
const FIRST_CLIENT: u64 = 1 << 32;

/// How long no client is accepted after the system refused one, out of file descriptors perhaps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Poll {
    options: Options,
    version: Arc<VersionInfo>,
    epoll: Epoll,
    outputs: Outputs,
    machine: Machine,
    chardevs: Chardevs,
    /// Each with its number in `chardevs`.
    listeners: Vec<(Listener, usize)>,
    clients: BTreeMap<u64, Connection>,
    next_client: u64,
    accepting: bool,
    accept_again: Option<Instant>,
    limiter: Limiter,
    /// When shutting down: the latest end.
    closing: Option<Instant>,
}

impl Poll {
    pub(super) fn new(
        options: Options,
        outputs: Outputs,
        machine: Machine,
        chardevs: Chardevs,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = outputs.event().as_raw_fd();
        epoll.ctl(ControlOperation::Add, wake, EpollEvent::new(EventSet::IN, OUTPUTS))?;
        Ok(Self {
            version: Arc::new(options.version.clone()),
            options,
            epoll,
            outputs,
            machine,
            chardevs,
            listeners: Vec::new(),
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            accepting: true,
            accept_again: None,
            limiter: Limiter::default(),
            closing: None,
        })
    }

    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::default(); 64];
        while !self.is_done() {
            let count = match self.epoll.wait(self.timeout(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the QMP monitors have to end");
                    break;
                }
            };
            for event in events.iter().take(count) {
                match event.data() {
                    OUTPUTS => self.take_outputs(),
                    token if token < FIRST_CLIENT => self.accept(token),
                    token => self.client_ready(token, event.event_set()),
                }
            }
            self.accept_again_if_due();
            self.tell_if_due();
        }
        for connection in std::mem::take(&mut self.clients).into_values() {
            connection.close();
        }
    }

    fn is_done(&self) -> bool {
        self.closing.is_some_and(|end| {
            self.clients.values().all(Connection::is_flushed) || Instant::now() >= end
        })
    }

    /// Milliseconds until something has to be done without being told; -1 for never.
    fn timeout(&self) -> i32 {
        let soonest = || self.accept_again.into_iter().chain(self.limiter.next()).min();
        let Some(due) = self.closing.or_else(soonest) else { return -1 };
        let left = due.saturating_duration_since(Instant::now());
        // Rounded up, or the last millisecond would be spent spinning.
        i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1)
    }

    fn take_outputs(&mut self) {
        self.outputs.acknowledge();
        while let Some(output) = self.outputs.next() {
            match output {
                Output::Reply { monitor, message, oob } => {
                    if let Some(client) = self.clients.get_mut(&monitor.0) {
                        client.answered(message, oob);
                    }
                    self.serve(monitor.0, false);
                }
                Output::Event { message, limit } => self.happened(message.into(), limit),
                Output::Listen { listener, first, chardev } => {
                    self.listen(listener, first, chardev);
                }
                Output::Serve(stream, chardev) => self.add_client(stream, chardev),
                Output::Shutdown => self.shut_down(),
            }
        }
        self.serve_all();
    }

    /// An event is told, now or later.
    fn happened(&mut self, message: Arc<[u8]>, limit: Option<String>) {
        let now = match limit {
            Some(key) if self.closing.is_none() => self.limiter.pass(key, message, Instant::now()),
            _ => Some(message),
        };
        if let Some(message) = now {
            self.tell(&message);
        }
    }

    fn tell_if_due(&mut self) {
        let due = self.limiter.due(Instant::now());
        if !due.is_empty() {
            due.iter().for_each(|message| self.tell(message));
            self.serve_all();
        }
    }

    /// Queues an event for every negotiated client. They are served when all outputs were taken.
    fn tell(&mut self, message: &Arc<[u8]>) {
        let limit = self.options.unread;
        let mut lost = Vec::new();
        for (&token, client) in &mut self.clients {
            if client.negotiated() && !client.is_deaf() && !client.event(message, limit) {
                lost.push(token);
            }
        }
        for token in lost {
            tracing::warn!(monitor = token, limit, "a QMP client does not read its events: closed");
            self.drop_client(token);
        }
    }

    fn listen(&mut self, listener: Listener, first: Option<Stream>, chardev: usize) {
        let token = self.listeners.len() as u64 + 1;
        let interest = if self.accepting { EventSet::IN } else { EventSet::empty() };
        let event = EpollEvent::new(interest, token);
        match self.epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event) {
            Ok(()) => self.listeners.push((listener, chardev)),
            Err(error) => tracing::error!(%error, "the QMP socket cannot be served"),
        }
        if let Some(stream) = first {
            self.add_client(stream, chardev);
        }
    }

    fn shut_down(&mut self) {
        for message in self.limiter.rest() {
            self.tell(&message);
        }
        self.closing.get_or_insert(Instant::now() + self.options.linger);
        self.listeners.clear();
    }

    fn accept(&mut self, token: u64) {
        while self.clients.len() < self.options.clients {
            let index = usize::try_from(token).unwrap_or(0).wrapping_sub(1);
            let Some(&(ref listener, chardev)) = self.listeners.get(index) else { return };
            match listener.accept() {
                Ok(stream) => self.add_client(stream, chardev),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "a QMP client cannot be accepted yet");
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    return self.set_accepting(false);
                }
            }
        }
        self.set_accepting(false);
    }

    fn set_accepting(&mut self, accepting: bool) {
        if self.accepting == accepting {
            return;
        }
        self.accepting = accepting;
        let interest = if accepting { EventSet::IN } else { EventSet::empty() };
        for (index, (listener, _)) in self.listeners.iter().enumerate() {
            let event = EpollEvent::new(interest, index as u64 + 1);
            self.control(ControlOperation::Modify, listener.as_raw_fd(), event);
        }
    }

    fn accept_again_if_due(&mut self) {
        if self.accept_again.is_some_and(|due| due <= Instant::now()) {
            self.accept_again = None;
        }
        if self.accept_again.is_none() && self.clients.len() < self.options.clients {
            self.set_accepting(true);
        }
    }

    fn add_client(&mut self, stream: Stream, chardev: usize) {
        let token = self.next_client;
        let event = EpollEvent::new(EventSet::empty(), token);
        let added = stream
            .set_nonblocking(true)
            .and_then(|()| self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event));
        if let Err(error) = added {
            tracing::warn!(%error, "a QMP client cannot be served");
            return;
        }
        self.next_client += 1;
        self.chardevs.connected(chardev, token, &stream);
        let session = Session::new(self.options.limits, self.version.clone(), self.options.without);
        self.clients.insert(token, Connection::new(MonitorId(token), stream, session));
        self.serve(token, false);
    }

    fn client_ready(&mut self, token: u64, ready: EventSet) {
        if ready.intersects(EventSet::HANG_UP | EventSet::ERROR)
            && let Some(client) = self.clients.get_mut(&token)
            && !client.is_deaf()
        {
            client.deafen();
        }
        self.serve(token, ready.contains(EventSet::IN));
    }

    fn serve_all(&mut self) {
        let tokens: Vec<u64> = self.clients.keys().copied().collect();
        for token in tokens {
            self.serve(token, false);
        }
    }

    /// Does what can be done for a client, then waits for the right things, or lets it go.
    fn serve(&mut self, token: u64, readable: bool) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        match self.closing {
            None => client.pump(&self.machine, readable),
            Some(_) => client.flush(),
        }
        if client.is_over() {
            return self.drop_client(token);
        }
        let (fd, event) = (client.fd(), client.interest(self.closing.is_none()));
        if client.is_deaf() {
            // Its hang-up would be told again and again.
            self.forget(fd);
        } else {
            self.control(ControlOperation::Modify, fd, EpollEvent::new(event, token));
        }
    }

    fn drop_client(&mut self, token: u64) {
        if let Some(client) = self.clients.remove(&token) {
            tracing::debug!(monitor = client.id().0, "a QMP client is closed");
            self.forget(client.fd());
            self.chardevs.gone(token);
            client.close();
        }
    }

    /// The descriptor may have been forgotten before.
    fn forget(&self, fd: RawFd) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, event: EpollEvent) {
        if let Err(error) = self.epoll.ctl(operation, fd, event) {
            tracing::error!(%error, "a QMP socket cannot be watched");
        }
    }
}
