//! One client: its socket, its session, and what waits in either direction.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, mpsc};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::outbox::{Outbox, Reply};
use super::output::OutputQueue;
use super::session::{Message, Session, Step};
use super::stream::Stream;
use super::{MonitorId, Request};

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// Bytes read of one client before the others get their turn.
const TURN: usize = 1 << 20;

/// No more commands are taken of a client while more output than this waits for it.
const HIGH_WATER: usize = 64 << 10;

/// Messages of a client with out-of-band execution that wait for a command under way; and commands
/// that it has under way out of band.
const QUEUE: usize = 8;

/// Where commands go.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) event: EventFd,
    pub(super) outbox: Outbox,
}

#[derive(Debug)]
pub(super) struct Connection {
    id: MonitorId,
    stream: Stream,
    session: Session,
    input: Vec<u8>,
    /// Bytes of `input` that the session has taken.
    taken: usize,
    output: OutputQueue,
    /// Messages that wait for their turn: with out-of-band execution the client is read from while a
    /// command is under way.
    pending: VecDeque<Message>,
    /// The machine is at work for this client.
    executing: bool,
    /// Commands under way out of band.
    out_of_band: usize,
    /// The client sends nothing more.
    ended: bool,
    /// The client reads nothing more. What it sent before is still done.
    deaf: bool,
}

impl Connection {
    pub(super) fn new(id: MonitorId, stream: Stream, session: Session) -> Self {
        let mut output = OutputQueue::default();
        output.push(session.greeting().into());
        Self {
            id,
            stream,
            session,
            input: Vec::new(),
            taken: 0,
            output,
            pending: VecDeque::new(),
            executing: false,
            out_of_band: 0,
            ended: false,
            deaf: false,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn id(&self) -> MonitorId {
        self.id
    }

    /// Whether it gets events.
    pub(super) fn negotiated(&self) -> bool {
        self.session.negotiated()
    }

    /// Whether there is nothing left to do for it.
    pub(super) fn is_over(&self) -> bool {
        let busy = self.executing || self.out_of_band > 0 || !self.pending.is_empty();
        self.ended && !busy && self.output.waiting() == 0
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.output.waiting() == 0
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// What to wait for on the socket.
    pub(super) fn interest(&self, reading: bool) -> EventSet {
        let mut interest = EventSet::empty();
        if reading && !self.ended && self.may_take() {
            interest |= EventSet::IN;
        }
        if self.output.waiting() > 0 {
            interest |= EventSet::OUT;
        }
        interest
    }

    /// Nothing is sent any more.
    pub(super) fn deafen(&mut self) {
        self.deaf = true;
        self.output.clear();
    }

    /// The answer to a command that the machine ran.
    pub(super) fn answered(&mut self, message: Vec<u8>, oob: bool) {
        if oob {
            self.out_of_band = self.out_of_band.saturating_sub(1);
        } else {
            self.executing = false;
        }
        // Few can be under way, so few answers can wait.
        self.push(message.into());
    }

    /// Adds an event, unless events of more than `limit` bytes would wait; says whether it was added.
    /// Answers do not count: the client has asked for them, and they may be long.
    pub(super) fn event(&mut self, message: &Arc<[u8]>, limit: usize) -> bool {
        let fits = |this: &Self| this.output.events() + message.len() <= limit;
        if !fits(self) {
            // Much may have been told since the last flush: perhaps the client does read.
            self.flush();
        }
        let fits = fits(self);
        if fits && !self.deaf {
            self.output.push_event(message.clone());
        }
        fits
    }

    fn push(&mut self, message: Arc<[u8]>) {
        if !self.deaf {
            self.output.push(message);
        }
    }

    pub(super) fn flush(&mut self) {
        if let Err(error) = self.output.flush(&mut self.stream) {
            tracing::debug!(monitor = self.id.0, %error, "a QMP client left without reading");
            self.deafen();
        }
    }

    /// Does what can be done: takes commands as long as that is allowed, writes, and, if there may be
    /// something, reads.
    pub(super) fn pump(&mut self, machine: &Machine, readable: bool) {
        let mut turn = TURN;
        loop {
            self.flush();
            self.run_pending(machine);
            while self.may_take() && self.take(machine) {}
            self.flush();
            if !self.may_take() || self.ended {
                return;
            }
            if turn == 0 {
                self.ended |= self.deaf;
                return;
            }
            if self.taken == self.input.len() {
                // No one tells when there is something to read of a client that is gone.
                if !readable && !self.deaf {
                    return;
                }
                match self.read() {
                    Some(count) => turn = turn.saturating_sub(count),
                    None => return,
                }
            }
        }
    }

    fn may_take(&self) -> bool {
        let free = match self.session.oob() {
            true => self.pending.len() < QUEUE && self.out_of_band < QUEUE,
            false => !self.executing && self.pending.is_empty(),
        };
        free && self.output.waiting() <= HIGH_WATER
    }

    /// Takes the next message from what was read; false if there is none.
    fn take(&mut self, machine: &Machine) -> bool {
        let mut rest = self.input.get(self.taken..).unwrap_or_default();
        let message = self.session.next(&mut rest);
        self.taken = self.input.len() - rest.len();
        let Some(message) = message else { return false };
        if matches!(&message, Ok(incoming) if incoming.oob) {
            self.run(message, true, machine);
        } else {
            self.pending.push_back(message);
            self.run_pending(machine);
        }
        true
    }

    /// Runs what waits, in order, up to a command that the machine has to answer.
    fn run_pending(&mut self, machine: &Machine) {
        while !self.executing && self.output.waiting() <= HIGH_WATER {
            let Some(message) = self.pending.pop_front() else { return };
            self.run(message, false, machine);
        }
    }

    fn run(&mut self, message: Message, oob: bool, machine: &Machine) {
        match self.session.step(message) {
            Step::Answer(message) => self.push(message.into()),
            Step::Run { id, command } => {
                match oob {
                    true => self.out_of_band += 1,
                    false => self.executing = true,
                }
                let reply = Reply::new(machine.outbox.clone(), self.id, id, command.name(), oob);
                let request = Request { monitor: self.id, command: *command, reply };
                // With no one left to run it, the request is dropped, which answers it.
                if machine.requests.send(request).is_ok()
                    && let Err(error) = machine.event.write(1)
                {
                    tracing::debug!(%error, "the machine was already woken");
                }
            }
        }
    }

    /// Reads the next chunk; `None` if there is none now, or at all.
    fn read(&mut self) -> Option<usize> {
        self.taken = 0;
        self.input.resize(CHUNK, 0);
        let count = loop {
            match self.stream.read(&mut self.input) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // A client that is gone sends nothing more.
                    self.ended |= self.deaf;
                    break None;
                }
                Ok(0) => {
                    self.ended = true;
                    break None;
                }
                Ok(count) => break Some(count),
                Err(error) => {
                    tracing::debug!(monitor = self.id.0, %error, "a QMP client is lost");
                    self.ended = true;
                    self.deafen();
                    break None;
                }
            }
        };
        self.input.truncate(count.unwrap_or(0));
        if self.input.is_empty() {
            // Idle clients are many, and cost nothing.
            self.input = Vec::new();
        }
        count
    }

    /// Closes the connection so that the client reads all that was sent, and then the end. What it
    /// has sent is read and dropped, or it would get ECONNRESET instead.
    pub(super) fn close(mut self) {
        if self.stream.shutdown().is_ok() {
            drop_input(&mut self.stream);
        }
    }
}

/// Reads what there is, but not for ever: a TCP client may go on sending.
fn drop_input(from: &mut impl Read) {
    let mut dropped = [0; 4096];
    for _ in 0..TURN / dropped.len() {
        if !matches!(from.read(&mut dropped), Ok(1..)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::json::Limits;
    use crate::schema::{VersionInfo, VersionTriple};

    fn connected() -> (Connection, UnixStream) {
        let (ours, peer) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let qemu = VersionTriple { micro: 2, minor: 0, major: 10 };
        let version = Arc::new(VersionInfo { qemu, package: String::new() });
        let session = Session::new(Limits::default(), version, &[]);
        (Connection::new(MonitorId(1), Stream::Unix(ours), session), peer)
    }

    #[test]
    fn answers_that_were_read_leave_no_room_for_more_events() {
        const MIB: usize = 1 << 20;
        let (mut connection, mut peer) = connected();
        let mut buffer = [0; 4096];
        for _ in 0..16 {
            connection.answered(vec![b'x'; MIB], false);
            // A slow client: it reads until half a MiB is left, never everything.
            while connection.output.waiting() > MIB / 2 {
                connection.flush();
                let _ = peer.read(&mut buffer).unwrap();
            }
        }
        let event: Arc<[u8]> = vec![b'e'; MIB / 16].into();
        let room = (0..1000).take_while(|_| connection.event(&event, MIB)).count();
        // The kernel's buffer is full.
        assert_eq!(room, 16);
    }

    #[test]
    fn the_end_does_not_wait_for_a_client_that_never_stops_sending() {
        drop_input(&mut std::io::repeat(0));
    }
}
