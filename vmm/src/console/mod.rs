//! Where the guest's serial port goes: the terminal, a file, a socket, or nowhere.
//!
//! The guest writes from a vCPU thread, which pauses, stops and ends wait for, so output must not
//! wait for a reader for ever: what one does not take at once (a client, a pipe, a terminal after Ctrl-S)
//! is kept for it, see [`outbox`]. Input is read by the main event loop, which hands over what is kept, too.

mod outbox;
mod socket;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qmp::schema::ChardevInfo;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::terminal::RawTerminal;
use outbox::{Outbox, Reader};
pub use socket::SocketConsole;

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
        /// The way to standard output.
        output: StdioOutput,
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
                Ok(Self::Stdio { input, terminal: None, output: StdioOutput::new()? })
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
        if let Self::Stdio { input, terminal, .. } = self {
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
            Self::Stdio { output, .. } => Box::new(output.clone()),
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

    /// Readable when output waits for a reader: then [`Console::output_fd`] is to be watched for room.
    pub fn output_waits(&self) -> Option<&EventFd> {
        match self {
            Self::Stdio { output, .. } => Some(&output.waits),
            Self::Null | Self::None | Self::File(_) => None,
            Self::Socket(socket) => Some(socket.output_waits()),
        }
    }

    /// Where output goes that may wait; no other descriptor to be watched has this number.
    pub fn output_fd(&self) -> Option<RawFd> {
        match self {
            Self::Stdio { output, .. } => Some(output.outbox.fd()),
            Self::Null | Self::None | Self::File(_) => None,
            Self::Socket(socket) => socket.output_fd(),
        }
    }

    /// There is room at [`Console::output_fd`]: hands over what waits; tells whether something still does.
    pub fn send_kept(&self) -> bool {
        match self {
            Self::Stdio { output, .. } => output.outbox.send_kept(),
            Self::Null | Self::None | Self::File(_) => false,
            Self::Socket(socket) => socket.send_kept(),
        }
    }

    /// The machine has ended: what waits is still handed over, to a reader that reads.
    pub fn finish(&self) {
        match self {
            Self::Stdio { output, .. } => output.outbox.finish(),
            Self::Null | Self::None | Self::File(_) => {}
            Self::Socket(socket) => socket.finish(),
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

    /// After [`Input::End`]: the descriptor of output that has to be watched no longer.
    pub fn ended_output_fd(&self) -> Option<RawFd> {
        match self {
            Self::Socket(socket) => socket.ended_output_fd(),
            _ => None,
        }
    }

    /// After [`Input::End`], once its descriptors are watched no longer.
    pub fn close_ended(&mut self) {
        if let Self::Socket(socket) = self {
            socket.close_ended();
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn new_event() -> io::Result<Arc<EventFd>> {
    Ok(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?))
}

/// Standard output.
#[derive(Clone)]
pub struct StdioOutput {
    outbox: Arc<Outbox>,
    waits: Arc<EventFd>,
}

impl StdioOutput {
    fn new() -> io::Result<Self> {
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        let waits = new_event()?;
        let outbox = Outbox::new(Box::new(Blocking(File::from(stdout))), Arc::clone(&waits));
        Ok(Self { outbox: Arc::new(outbox), waits })
    }
}

impl Write for StdioOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.outbox.write(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A descriptor in blocking mode, which others may have too: it is written to only when it takes something.
struct Blocking(File);

impl AsRawFd for Blocking {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Reader for Blocking {
    fn offer(&self, bytes: &[u8]) -> io::Result<usize> {
        if !writable_within(self.as_raw_fd(), Duration::ZERO) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // Ready means that there is room for a byte, not for all of them.
        (&self.0).write(&bytes[..bytes.len().min(1)])
    }
}

/// Whether a descriptor takes bytes, or has an error to tell, within `time`.
fn writable_within(fd: RawFd, time: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // Rounded up, or the last millisecond would be spent spinning.
    let millis = i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: the array has one element. A number that is no descriptor is told in it.
    unsafe { libc::poll(&raw mut poll, 1, millis) > 0 }
}
