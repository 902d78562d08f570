//! Waiting for what a client sends, and taking it.

use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::PollFlags;

use crate::nbd::connection::Failure;
use crate::nbd::socket::{self, Moved};
use crate::nbd::wire::request::header_len;

use super::{Incoming, Transmission, look};

impl Transmission {
    /// Receives what there is, after waiting for whatever can happen next.
    pub(super) fn receive(&mut self, idle: bool) -> Result<(), Failure> {
        let wanted = self.starved && !self.disconnected && !self.closed;
        if wanted && idle {
            return self.receive_waiting();
        }
        if wanted && !self.drained && self.fill(false)? {
            return Ok(());
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, wanted);
        flags.set(PollFlags::OUT, !self.outbox.is_empty());
        let mut fds = Vec::with_capacity(2);
        if !flags.is_empty() {
            // With no flags set poll would still report a hang-up, and never sleep.
            fds.push((self.socket.as_fd(), flags));
        }
        if self.queue.in_flight() > 0 {
            fds.push((self.queue.event(), PollFlags::IN));
        }
        socket::wait(&fds, None)?;
        self.drained = false;
        Ok(())
    }

    /// Waits for the next request with nothing else to do.
    fn receive_waiting(&mut self) -> Result<(), Failure> {
        if self.look.wanted() {
            let start = Instant::now();
            while start.elapsed() < look::LONGEST {
                if self.fill(false)? {
                    self.look.ended(true);
                    return Ok(());
                }
                // The client may have to run here.
                std::thread::yield_now();
            }
            self.look.ended(false);
        }
        self.fill(true)?;
        Ok(())
    }

    /// Says whether anything came; the end counts.
    fn fill(&mut self, wait: bool) -> Result<bool, Failure> {
        let header = header_len(self.mode);
        let ahead = if self.large { header } else { usize::MAX };
        let (first, most) = match &mut self.incoming {
            Incoming::Payload(write) => (&mut write.buf[write.filled..write.len as usize], ahead),
            Incoming::Header => (&mut [][..], ahead),
            Incoming::Skip { .. } => (&mut [][..], usize::MAX),
        };
        let wished = first.len().saturating_add(most);
        let (moved, direct) = self.inbox.fill(&self.socket, first, most, wait)?;
        if let Incoming::Payload(write) = &mut self.incoming {
            write.filled += direct;
        }
        match moved {
            Moved::Bytes(n) => self.drained = n < wished,
            Moved::Nothing => self.drained = true,
            Moved::End => self.closed = true,
        }
        Ok(moved != Moved::Nothing)
    }
}
