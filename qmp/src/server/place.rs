//! Where a monitor is: a file or port to listen on or to connect to.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::ListenError;
use super::stream::Stream;

/// The address of a monitor's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file.
    Unix(PathBuf),
    /// A TCP port of this host. Whoever connects commands the machine, so other hosts may not.
    Tcp {
        /// Name or address, which must be of the loopback interface.
        host: String,
        /// The port.
        port: u16,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(out, "{}", path.display()),
            Self::Tcp { host, port } => write!(out, "{host}:{port}"),
        }
    }
}

impl Place {
    /// As QEMU writes it.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Unix(_) => format!("unix:{self}"),
            Self::Tcp { .. } => format!("tcp:{self}"),
        }
    }

    /// Connects to who listens there.
    pub(super) fn connect(&self) -> Result<Stream, ListenError> {
        let connected = match self {
            Self::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
            Self::Tcp { host, port } => {
                TcpStream::connect(&*self.loopback(host, *port)?).and_then(tcp)
            }
        };
        connected.map_err(|source| self.failed("connect", source))
    }

    /// Listens on a port; `None` for a file.
    pub(super) fn bind_tcp(&self) -> Result<Option<TcpListener>, ListenError> {
        let Self::Tcp { host, port } = self else { return Ok(None) };
        let bound = TcpListener::bind(&*self.loopback(host, *port)?).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(Some(listener))
        });
        bound.map_err(|source| self.failed("listen", source))
    }

    fn loopback(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ListenError> {
        let found = (host, port).to_socket_addrs();
        let found: Vec<SocketAddr> =
            found.map_err(|source| self.failed("look up the address", source))?.collect();
        if found.is_empty() || !found.iter().all(|address| address.ip().is_loopback()) {
            return Err(ListenError::NotLoopback(self.to_string()));
        }
        Ok(found)
    }

    pub(super) fn failed(&self, action: &'static str, source: io::Error) -> ListenError {
        ListenError::Io { path: self.to_string().into(), action, source }
    }
}

/// Answers are small and awaited.
pub(super) fn tcp(stream: TcpStream) -> io::Result<Stream> {
    stream.set_nodelay(true)?;
    Ok(Stream::Tcp(stream))
}
