//! A monitor on standard input and output.
//!
//! These may be a terminal, a pipe or a file, shared with other processes: setting them to
//! non-blocking would disturb those, and a file cannot be polled. So two threads carry the bytes
//! between them and a socket pair, one end of which is a client like any other.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

const CHUNK: usize = 16 << 10;

/// The carriers. What was written reaches standard output before this is gone, if somebody reads.
#[derive(Debug)]
pub(super) struct Carriers {
    /// In a lock for the server to be shared between threads.
    done: Mutex<Receiver<()>>,
    linger: Duration,
}

/// Starts the threads; the stream is for the server.
pub(super) fn carry(linger: Duration) -> io::Result<(UnixStream, Carriers)> {
    let (server, ours) = UnixStream::pair()?;
    let (mut reading, mut writing) = (ours.try_clone()?, ours);
    let (sender, done) = channel::<()>();
    Builder::new().name("qmp-stdin".into()).spawn(move || {
        if let Err(error) = copy(&mut io::stdin(), &mut reading) {
            tracing::debug!(%error, "QMP on standard input ends");
        }
        // The server hears of the end, and still answers what came before.
        let _ = reading.shutdown(Shutdown::Write);
    })?;
    Builder::new().name("qmp-stdout".into()).spawn(move || {
        if let Err(error) = copy(&mut writing, &mut io::stdout()) {
            tracing::debug!(%error, "QMP on standard output ends");
        }
        let _ = writing.shutdown(Shutdown::Both);
        drop(sender);
    })?;
    Ok((server, Carriers { done: Mutex::new(done), linger }))
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        to.write_all(buffer.get(..count).unwrap_or_default())?;
        to.flush()?;
    }
}

impl Drop for Carriers {
    fn drop(&mut self) {
        // The sender is dropped when all is written; nothing is ever sent.
        let done = self.done.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = done.recv_timeout(self.linger);
    }
}
