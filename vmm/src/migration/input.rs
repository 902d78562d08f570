//! Where an incoming stream is read from: a file, a command or a socket.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};

use block::host_words;
use rustix::event::PollFlags;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::address::Address;
use super::command::Running;
use super::connect::try_connect;
use super::output::{is_transient, nonblocking};
use super::wait::Stopper;

/// What a stream can be read from once somebody is there.
#[derive(Debug)]
pub enum Prepared {
    /// A file, at the stream's beginning.
    File(File),
    /// A command, and its output.
    Command(Running, ChildStdout),
    /// Somebody is waited for.
    Socket(Waiting),
}

/// A socket that is listened on. Its file goes when this is dropped.
#[derive(Debug)]
pub struct Waiting {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Someone may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An open way that a stream comes.
#[derive(Debug)]
pub struct Input {
    kind: Kind,
    stopper: Stopper,
}

#[derive(Debug)]
enum Kind {
    File(File),
    Command(Running, ChildStdout),
    Socket(UnixStream),
}

/// Opens the file, starts the command, or listens on the socket.
///
/// # Errors
/// That fails; the text is QEMU's, as far as it has one.
pub fn prepare(address: &Address) -> Result<Prepared, String> {
    match address {
        Address::File { path, offset } => {
            let failed = |error: io::Error| {
                format!("Could not open '{}': {}", path.display(), host_words(&error))
            };
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_NONBLOCK);
            let mut file = options.open(path).map_err(failed)?;
            if *offset > 0 {
                file.seek(SeekFrom::Start(*offset)).map_err(failed)?;
            }
            Ok(Prepared::File(file))
        }
        Address::Exec(args) => {
            let failed = |error| format!("cannot run '{}': {error}", args.join(" "));
            let mut command =
                Running::start(args, Stdio::null(), Stdio::piped()).map_err(failed)?;
            let output = command.child().stdout.take();
            let output = output.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
            nonblocking(output.as_fd()).map_err(failed)?;
            Ok(Prepared::Command(command, output))
        }
        Address::Unix(path) => {
            let failed = |error: io::Error| {
                format!("Failed to bind socket to {}: {}", path.display(), host_words(&error))
            };
            let listener = bind(path).map_err(failed)?;
            Ok(Prepared::Socket(Waiting { listener, path: path.clone() }))
        }
    }
}

/// Listens, for this user alone. A file that nobody listens on any more makes room.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let abandoned =
        try_connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if abandoned {
        std::fs::remove_file(path)?;
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before bind: the file takes the mode over.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 1)?;
    Ok(UnixListener::from(socket))
}

/// Whether there is anything to read. One who only wanted to know whether somebody listens has gone again.
fn says_something(stream: &UnixStream) -> bool {
    let mut byte = [0; 1];
    let peeked = rustix::net::recv(stream, &mut byte, rustix::net::RecvFlags::PEEK);
    peeked.is_ok_and(|(count, _)| count > 0)
}

impl Input {
    /// Waits until somebody is there.
    ///
    /// # Errors
    /// It was told to stop.
    pub fn open(prepared: Prepared, stopper: Stopper) -> io::Result<Self> {
        let kind = match prepared {
            Prepared::File(file) => Kind::File(file),
            Prepared::Command(command, output) => Kind::Command(command, output),
            Prepared::Socket(waiting) => loop {
                stopper.wait(waiting.listener.as_fd(), PollFlags::IN)?;
                match waiting.listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(true)?;
                        stopper.wait(stream.as_fd(), PollFlags::IN)?;
                        if says_something(&stream) {
                            break Kind::Socket(stream);
                        }
                    }
                    Err(error) if is_transient(&error) => {}
                    Err(error) => return Err(error),
                }
            },
        };
        Ok(Self { kind, stopper })
    }

    /// Whether the stream's end is that of what it comes from.
    pub fn ends(&self) -> bool {
        !matches!(self.kind, Kind::Socket(_))
    }

    /// All was read: a command must have ended well.
    ///
    /// # Errors
    /// It has not.
    pub fn finish(&mut self) -> Result<(), String> {
        match &mut self.kind {
            Kind::Command(command, _) => command.finish(&self.stopper),
            Kind::File(_) | Kind::Socket(_) => Ok(()),
        }
    }

    /// After an error: what the other end has to say of it.
    pub fn reason(&mut self) -> Option<String> {
        match &mut self.kind {
            Kind::Command(command, _) => command.end(),
            _ => None,
        }
    }
}

impl Read for Input {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            let fd = match &self.kind {
                Kind::File(file) => file.as_fd(),
                Kind::Command(_, output) => output.as_fd(),
                Kind::Socket(stream) => stream.as_fd(),
            };
            self.stopper.wait(fd, PollFlags::IN)?;
            let read = match &mut self.kind {
                Kind::File(file) => file.read(to),
                Kind::Command(_, output) => output.read(to),
                Kind::Socket(stream) => stream.read(to),
            };
            match read {
                Err(error) if is_transient(&error) => {}
                other => return other,
            }
        }
    }
}
