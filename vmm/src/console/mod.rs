//! Where the guest's serial port goes: the terminal, a file, a socket, or nowhere.
//!
//! The guest writes from a vCPU thread, which pauses, stops and ends wait for, so output must not
//! wait for a reader for ever: one that does not read (a client, a pipe, a terminal after Ctrl-S)
//! holds the vCPU up for [`PATIENCE`] at a time, then bytes are dropped. Input is read by the main
//! event loop.

mod socket;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::schema::ChardevInfo;

use crate::terminal::RawTerminal;
pub use socket::SocketConsole;

/// How long output waits for a reader that does not read before it is dropped.
const PATIENCE: Duration = Duration::from_millis(100);

/// `--serial`: what the port is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// This program's standard input and output.
    Stdio,
    /// Output is thrown away, there is no input.
    Null,
    /// The same, and no character device is told of.
    None,
    /// Output goes to a file, there is no input.
    File(PathBuf),
    /// A listening unix socket, one client at a time.
    Unix {
        /// Where the socket is made.
        path: PathBuf,
        /// Whether the machine starts only once a client is there.
        wait: bool,
    },
}

/// The host's end of the serial port.
pub enum Console {
    /// Standard input and output.
    Stdio {
        /// Standard input, read without a buffer of our own that epoll would not know of.
        input: File,
        /// Set while the terminal is raw; puts it back when dropped.
        terminal: Option<RawTerminal>,
    },
    /// Nowhere.
    Null,
    /// Nowhere, and nothing is told of it.
    None,
    /// A file.
    File(File),
    /// A socket.
    Socket(SocketConsole),
}

/// What the event loop must do after it read input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// So many bytes were read.
    Bytes(usize),
    /// Nothing to read now.
    Nothing,
    /// The other end is gone; watch it no longer.
    End,
}

impl Console {
    /// Opens the host's end.
    ///
    /// # Errors
    /// The file cannot be made, or the socket's path is taken.
    pub fn open(spec: &ConsoleSpec) -> io::Result<Self> {
        match spec {
            ConsoleSpec::Stdio => {
                let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                Ok(Self::Stdio { input, terminal: None })
            }
            ConsoleSpec::Null => Ok(Self::Null),
            ConsoleSpec::None => Ok(Self::None),
            ConsoleSpec::File(path) => Ok(Self::File(File::create(path)?)),
            ConsoleSpec::Unix { path, wait } => {
                let socket = SocketConsole::listen(path)?;
                if *wait {
                    socket.wait_for_client()?;
                }
                Ok(Self::Socket(socket))
            }
        }
    }

    /// Makes the terminal raw, where the console is one. Signals must be handled by now: one with
    /// its default action would leave the terminal raw.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn take_terminal(&mut self) -> io::Result<()> {
        if let Self::Stdio { input, terminal } = self {
            *terminal = RawTerminal::enter(input, true)?;
        }
        Ok(())
    }

    /// Where the serial port writes to.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn output(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(match self {
            Self::Stdio { .. } => {
                let stdout = io::stdout().as_fd().try_clone_to_owned()?;
                Box::new(PatientOutput(File::from(stdout)))
            }
            Self::Null | Self::None => Box::new(io::sink()),
            Self::File(file) => Box::new(file.try_clone()?),
            Self::Socket(socket) => Box::new(socket.output()),
        })
    }

    /// Descriptors to watch for input or new clients.
    pub fn watched(&self) -> Vec<RawFd> {
        match self {
            Self::Stdio { input, .. } => vec![input.as_raw_fd()],
            Self::Null | Self::None | Self::File(_) => Vec::new(),
            Self::Socket(socket) => socket.watched(),
        }
    }

    /// What `query-chardev` tells of it, in QEMU's words.
    pub fn chardev(&self) -> Option<ChardevInfo> {
        let filename = match self {
            Self::None => return None,
            Self::Stdio { .. } => "stdio".to_owned(),
            Self::Null => "null".to_owned(),
            Self::File(_) => "file".to_owned(),
            Self::Socket(socket) => socket.address(),
        };
        Some(ChardevInfo { label: "serial0".to_owned(), filename, frontend_open: true })
    }

    /// The path of the socket, where it is one.
    pub fn socket_path(&self) -> Option<&Path> {
        match self {
            Self::Socket(socket) => Some(socket.path()),
            _ => None,
        }
    }

    /// Reads what is there after `fd` of [`Console::watched`] became readable.
    pub fn read(&mut self, fd: RawFd, buf: &mut [u8]) -> Input {
        let read = match self {
            Self::Stdio { input, .. } => input.read(buf),
            Self::Null | Self::None | Self::File(_) => return Input::End,
            Self::Socket(socket) => return socket.read(fd, buf),
        };
        match read {
            Ok(0) => Input::End,
            Ok(count) => Input::Bytes(count),
            Err(error) if is_transient(&error) => Input::Nothing,
            Err(_) => Input::End,
        }
    }

    /// After [`Input::End`], once its descriptor is watched no longer.
    pub fn close_ended(&mut self) {
        if let Self::Socket(socket) = self {
            socket.close_ended();
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A descriptor in blocking mode, written to only when it takes something.
struct PatientOutput(File);

impl Write for PatientOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // Ready means that there is room for a byte, not for all of them.
        let first = &buf[..buf.len().min(1)];
        if writable_within(&self.0, PATIENCE) { self.0.write(first) } else { Ok(buf.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn writable_within(fd: &impl AsRawFd, time: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let millis = i32::try_from(time.as_millis().max(1)).unwrap_or(i32::MAX);
    // SAFETY: the array has one element, and the descriptor is open while it is borrowed.
    unsafe { libc::poll(&raw mut poll, 1, millis) > 0 }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn output_nobody_reads_is_dropped_and_what_is_read_arrives() {
        let (writer, mut reader) = UnixStream::pair().unwrap();
        let mut output = PatientOutput(File::from(OwnedFd::from(writer)));
        output.write_all(b"hello").unwrap();
        let mut buf = [0; 5];
        reader.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"hello");
        // More than any socket buffer holds; a blocking write would never come back.
        let mut written = 0;
        while output.write(&[0; 2]).unwrap() == 1 {
            written += 1;
        }
        assert!(written > 0);
    }
}
