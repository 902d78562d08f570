//! The client's side of a connection: how it waits.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a client that polls looks for bytes before it sleeps.
const POLL: Duration = Duration::from_micros(50);

/// How a client waits for a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// It sleeps at once: each reply includes a processor's waking up.
    Sleep,
    /// It looks for [`POLL`] first.
    Poll,
}

/// A stream whose calls say themselves whether to wait.
pub(crate) struct Socket(UnixStream);

impl Socket {
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self(UnixStream::connect(path)?))
    }

    /// Has calls return where they would wait; what [`Socket::receive`] and [`Socket::send`] need.
    pub(crate) fn polled(self) -> io::Result<Self> {
        self.0.set_nonblocking(true)?;
        Ok(self)
    }

    /// The stream itself, for the handshake.
    pub(crate) fn stream(&mut self) -> &mut UnixStream {
        &mut self.0
    }

    /// Receives what there is, at least one byte.
    pub(crate) fn receive(&mut self, into: &mut [u8], wait: Wait) -> usize {
        let mut since = None;
        loop {
            match self.0.read(into) {
                Ok(0) => panic!("the server has closed the connection"),
                Ok(n) => return n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
            let since = since.get_or_insert_with(Instant::now);
            if wait == Wait::Sleep || since.elapsed() > POLL {
                self.sleep(libc::POLLIN);
            } else {
                // The server may have to run here.
                std::thread::yield_now();
            }
        }
    }

    /// Sends all of the parts.
    pub(crate) fn send(&mut self, mut parts: &mut [IoSlice<'_>]) {
        while !parts.is_empty() {
            match self.0.write_vectored(parts) {
                Ok(n) => IoSlice::advance_slices(&mut parts, n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.sleep(libc::POLLOUT),
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn sleep(&self, events: libc::c_short) {
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events, revents: 0 };
        // SAFETY: one pollfd that outlives the call. An error is a signal: the caller tries again.
        unsafe { libc::poll(&raw mut fd, 1, -1) };
    }
}
