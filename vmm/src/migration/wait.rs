//! Waiting for descriptors, for time, for a process, until it is told to stop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Makes all waits end, now and later. Clones are one.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<OwnedFd>);

impl Stopper {
    /// One that was not told yet.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(event)))
    }

    /// All waits are to end.
    pub fn stop(&self) {
        // It fails where it was told very often.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }

    /// Waits until the descriptor can be read from or written to, or is at its end.
    ///
    /// # Errors
    /// It was told to stop.
    pub fn wait(&self, fd: impl AsFd, flags: PollFlags) -> io::Result<()> {
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN), PollFd::new(&fd, flags)];
        loop {
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return Err(stopped());
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
        }
    }

    /// Waits for so long.
    ///
    /// # Errors
    /// It was told to stop.
    pub fn rest(&self, time: Duration) -> io::Result<()> {
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN)];
        match poll(&mut fds, Some(&time)) {
            // A signal makes it shorter: whoever waits looks at the clock.
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
            Ok(_) => Err(stopped()),
            Err(error) => Err(error.into()),
        }
    }
}

fn stopped() -> io::Error {
    io::Error::other("told to stop")
}
