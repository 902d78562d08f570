//! The listening socket and its file.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::place::{Place, tcp};
use super::stream::Stream;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process is there.
    #[error("QMP socket {}: another process is listening on it", .0.display())]
    InUse(PathBuf),
    /// Something is there that is not ours to remove.
    #[error("QMP socket {}: the file exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Others than this host could connect.
    #[error(
        "QMP socket {0}: not an address of this host alone, such as 127.0.0.1, ::1 or localhost: \
         whoever connects commands the machine"
    )]
    NotLoopback(String),
    /// The system refused.
    #[error("QMP socket {}: cannot {action}: {source}", path.display())]
    Io {
        /// The socket's file, or address.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// A listening socket. Its file goes when it is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Socket,
    place: Place,
}

#[derive(Debug)]
enum Socket {
    Unix { listener: UnixListener, _file: SocketFile },
    Tcp(TcpListener),
}

/// The file, known by its inode: another process may have put its own in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl Listener {
    pub(super) fn bind(place: &Place) -> Result<Self, ListenError> {
        let socket = match place {
            Place::Unix(path) => Socket::bind_unix(path)?,
            Place::Tcp { .. } => match place.bind_tcp()? {
                Some(listener) => Socket::Tcp(listener),
                None => return Err(place.failed("listen", io::ErrorKind::Unsupported.into())),
            },
        };
        Ok(Self { socket, place: place.clone() })
    }

    /// Where it listens, as QEMU writes it: a name or port 0 has become what it stands for.
    pub(super) fn address(&self) -> String {
        match &self.socket {
            Socket::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("tcp:{address}"),
                Err(_) => format!("tcp:{}", self.place),
            },
            Socket::Unix { .. } => format!("unix:{}", self.place),
        }
    }

    pub(super) fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Unix { listener, .. } => listener.accept().map(|(s, _)| Stream::Unix(s)),
            Socket::Tcp(listener) => listener.accept().and_then(|(stream, _)| tcp(stream)),
        }
    }

    fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match &self.socket {
            Socket::Unix { listener, .. } => listener.set_nonblocking(on),
            Socket::Tcp(listener) => listener.set_nonblocking(on),
        }
    }

    /// Blocks until a client connects.
    pub(super) fn wait_for_client(&self) -> Result<Stream, ListenError> {
        let accept = || {
            self.set_nonblocking(false)?;
            let client = self.accept()?;
            self.set_nonblocking(true)?;
            Ok(client)
        };
        accept().map_err(|source| self.place.failed("wait for a client", source))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match &self.socket {
            Socket::Unix { listener, .. } => listener.as_raw_fd(),
            Socket::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

impl Socket {
    fn bind_unix(path: &Path) -> Result<Self, ListenError> {
        let failed = |action| {
            move |source: Errno| ListenError::Io {
                path: path.to_owned(),
                action,
                source: source.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(failed("use the path"))?;
        remove_stale(path, &address)?;
        let socket = new_socket().map_err(failed("make a socket"))?;
        // Before bind: the file takes the mode over, and is never open to others for a moment.
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&socket, mode).map_err(failed("set the mode of the socket"))?;
        rustix::net::bind(&socket, &address).map_err(failed("create it"))?;
        let inode = std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        let file = SocketFile { path: path.to_owned(), inode };
        rustix::net::listen(&socket, BACKLOG).map_err(failed("listen on it"))?;
        Ok(Self::Unix { listener: UnixListener::from(socket), _file: file })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let now = std::fs::symlink_metadata(&self.path).ok().map(|meta| (meta.dev(), meta.ino()));
        if now.is_some() && now == self.inode {
            // It may be gone already, which is as well.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes a socket file that no one listens on. A process that died leaves it behind.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let failed = |action, source| ListenError::Io { path: path.to_owned(), action, source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at it", error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    let probe = new_socket().map_err(|error| failed("make a socket", error.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(|error| failed("remove the stale file", error))
        }
        Err(Errno::NOENT) => Ok(()),
        // A full backlog says that someone is there.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse(path.to_owned())),
        Err(error) => Err(failed("find out whether it is in use", error.into())),
    }
}
