//! Where an outgoing stream is written to: a file, a command or a socket.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdin, Stdio};

use block::host_words;
use rustix::event::PollFlags;

use super::address::Address;
use super::command::Running;
use super::connect::connect;
use super::wait::Stopper;

/// What can be opened while a client waits for its answer; a socket is connected by who writes to it.
#[derive(Debug)]
pub enum Prepared {
    /// A file, cut to where the stream begins.
    File(File),
    /// A command, and its input.
    Command(Running, ChildStdin),
    /// Somebody is to be connected to.
    Socket(std::path::PathBuf),
}

/// An open way for a stream.
#[derive(Debug)]
pub struct Output {
    kind: Kind,
    stopper: Stopper,
}

#[derive(Debug)]
enum Kind {
    File(File),
    Command(Running, Option<ChildStdin>),
    Socket(UnixStream),
}

/// Makes the file or starts the command.
///
/// # Errors
/// That fails; the text is QEMU's, as far as it has one.
pub fn prepare(address: &Address) -> Result<Prepared, String> {
    match address {
        Address::File { path, offset } => file(path, *offset).map(Prepared::File),
        Address::Exec(args) => {
            let failed = |error| format!("cannot run '{}': {error}", args.join(" "));
            let mut command =
                Running::start(args, Stdio::piped(), Stdio::null()).map_err(failed)?;
            let input = command.child().stdin.take();
            let input = input.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
            nonblocking(input.as_fd()).map_err(failed)?;
            Ok(Prepared::Command(command, input))
        }
        Address::Unix(path) => Ok(Prepared::Socket(path.clone())),
    }
}

fn file(path: &Path, offset: u64) -> Result<File, String> {
    let failed =
        |error: io::Error| format!("Could not create '{}': {}", path.display(), host_words(&error));
    // Not blocking: a FIFO that nobody reads is an error.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NONBLOCK);
    let mut file = options.open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        file.set_len(offset).map_err(failed)?;
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    }
    Ok(file)
}

impl Output {
    /// Connects, if that is still to be done.
    ///
    /// # Errors
    /// Nobody listens there, or it was told to stop.
    pub fn open(prepared: Prepared, stopper: Stopper) -> Result<Self, String> {
        let kind = match prepared {
            Prepared::File(file) => Kind::File(file),
            Prepared::Command(command, input) => Kind::Command(command, Some(input)),
            Prepared::Socket(path) => {
                let failed = |error: io::Error| {
                    format!("Failed to connect to '{}': {}", path.display(), host_words(&error))
                };
                Kind::Socket(connect(&path, &stopper).map_err(failed)?)
            }
        };
        Ok(Self { kind, stopper })
    }

    /// Makes durable what is there so far, where that takes long at the end.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn settle(&self) -> io::Result<()> {
        match &self.kind {
            Kind::File(file) if file.metadata()?.is_file() => file.sync_data(),
            _ => Ok(()),
        }
    }

    /// Whether the other end may go on with a guest once it has the end of the stream, and cannot be
    /// kept from it.
    pub fn is_final(&self) -> bool {
        matches!(self.kind, Kind::Socket(_))
    }

    /// The stream is complete: waits until the other end has all of it.
    ///
    /// # Errors
    /// It has not, or the command fails.
    pub fn finish(&mut self) -> Result<(), String> {
        match &mut self.kind {
            Kind::File(_) => self.settle().map_err(|error| error.to_string()),
            Kind::Command(command, input) => {
                *input = None;
                command.finish(&self.stopper)
            }
            Kind::Socket(stream) => {
                // A peer that closes it with data unread makes this a reset.
                let gone = |error: io::Error| format!("the peer has not read all: {error}");
                stream.shutdown(std::net::Shutdown::Write).map_err(gone)?;
                let mut byte = [0];
                loop {
                    self.stopper.wait(stream.as_fd(), PollFlags::IN).map_err(gone)?;
                    match stream.read(&mut byte) {
                        Ok(0) => return Ok(()),
                        Ok(_) => {}
                        Err(error) if is_transient(&error) => {}
                        Err(error) => return Err(gone(error)),
                    }
                }
            }
        }
    }

    /// After an error: what the other end has to say of it.
    pub fn reason(&mut self) -> Option<String> {
        match &mut self.kind {
            Kind::Command(command, input) => {
                *input = None;
                command.end()
            }
            _ => None,
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.kind {
            Kind::File(file) => file.write(bytes),
            Kind::Command(_, Some(input)) => input.write(bytes),
            Kind::Command(_, None) => Err(io::ErrorKind::BrokenPipe.into()),
            Kind::Socket(stream) => stream.write(bytes),
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::File(file) => Some(file.as_fd()),
            Kind::Command(_, input) => input.as_ref().map(AsFd::as_fd),
            Kind::Socket(stream) => Some(stream.as_fd()),
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            // Before each write: whoever reads may be fast, and the end be far.
            if let Some(fd) = self.fd() {
                self.stopper.wait(fd, PollFlags::OUT)?;
            }
            match self.try_write(bytes) {
                Err(error) if is_transient(&error) => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether it only means that nothing can be done just now.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Reads and writes return at once from now on.
pub(super) fn nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}
