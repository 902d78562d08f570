//! One client from its greeting on.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;

use super::export::Export;
use super::inbox::Inbox;
use super::negotiate::{Exports, Negotiation, Session, Step};
use super::server::Shared;
use super::socket::{self, Moved, Socket};
use super::transmit::Transmission;
use super::wire::option::{self, Header, greeting};
use std::os::fd::AsFd;

/// Longest data of an option that is looked at: a name and many queries. Longer data is skipped.
const MAX_OPTION: u32 = 64 << 10;
/// A client that claims more than this speaks something else.
const MAX_OPTION_CLAIM: u32 = 32 << 20;

/// Why a session ended before its client wished.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the handshake took too long")]
    Slow,
    #[error("the client closed the connection in the middle of the handshake")]
    Gone,
    #[error("the client breaks the protocol: {0}")]
    Protocol(String),
    #[error(transparent)]
    Block(#[from] crate::Error),
}

/// A client during the handshake.
struct Handshake<'a> {
    socket: &'a Socket,
    inbox: Inbox,
    deadline: Option<Instant>,
}

/// Serves a client until one side ends it. `chosen` hears of the export the client uses and may
/// refuse it.
pub(super) fn serve(
    shared: &Arc<Shared>,
    socket: &Arc<Socket>,
    deadline: Option<Instant>,
    chosen: impl FnOnce(&Arc<Export>) -> bool,
) -> Result<(), Failure> {
    let mut handshake = Handshake { socket, inbox: Inbox::new(), deadline };
    let Some(session) = handshake.negotiate(&**shared)? else {
        return Ok(());
    };
    if !chosen(&session.export) {
        return Ok(());
    }
    Transmission::new(socket.clone(), handshake.inbox, session)?.run()
}

impl Handshake<'_> {
    fn negotiate(
        &mut self,
        exports: &impl Exports<Export = Arc<Export>>,
    ) -> Result<Option<Session<Arc<Export>>>, Failure> {
        self.send(&greeting())?;
        let mut negotiation = Negotiation::default();
        let flags = u32::from_be_bytes(self.read_array()?);
        if !negotiation.client_flags(flags) {
            return Err(Failure::Protocol(format!("unknown flags {flags:#x}")));
        }
        loop {
            let header = Header::decode(&self.read_array::<{ option::HEADER }>()?)
                .ok_or_else(|| Failure::Protocol("not an option".to_owned()))?;
            let mut out = Vec::new();
            if header.len > MAX_OPTION {
                let skip = header.len <= MAX_OPTION_CLAIM;
                if !skip || !negotiation.too_big(header.option, &mut out) {
                    return Err(Failure::Protocol(format!("an option of {} bytes", header.len)));
                }
                self.skip(header.len as usize)?;
                self.send(&out)?;
                continue;
            }
            let mut data = vec![0; header.len as usize];
            self.read(&mut data)?;
            let step = negotiation.option(header.option, &data, exports, &mut out);
            self.send(&out)?;
            match step {
                Step::Continue => {}
                Step::Start(session) => return Ok(Some(session)),
                Step::Close => return Ok(None),
            }
        }
    }

    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, mut to: &mut [u8]) -> Result<(), Failure> {
        loop {
            let n = self.inbox.take(to);
            to = &mut to[n..];
            if to.is_empty() {
                return Ok(());
            }
            self.receive()?;
        }
    }

    fn skip(&mut self, mut left: usize) -> Result<(), Failure> {
        loop {
            let n = left.min(self.inbox.bytes().len());
            self.inbox.consume(n);
            left -= n;
            if left == 0 {
                return Ok(());
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Result<(), Failure> {
        // Also of a client that never pauses.
        self.check_time()?;
        match self.inbox.fill(self.socket, &mut [], usize::MAX, false)?.0 {
            Moved::Bytes(_) => Ok(()),
            Moved::End => Err(Failure::Gone),
            Moved::Nothing => self.wait(PollFlags::IN),
        }
    }

    fn send(&self, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            match self.socket.send(&[io::IoSlice::new(bytes)])? {
                Moved::Bytes(n) => bytes = &bytes[n..],
                Moved::End => return Err(Failure::Gone),
                Moved::Nothing => self.wait(PollFlags::OUT)?,
            }
        }
        Ok(())
    }

    fn check_time(&self) -> Result<(), Failure> {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Failure::Slow);
        }
        Ok(())
    }

    /// Waits, but no longer than a handshake may take in all.
    fn wait(&self, what: PollFlags) -> Result<(), Failure> {
        self.check_time()?;
        Ok(socket::wait(&[(self.socket.as_fd(), what)], self.deadline)?)
    }
}
