//! Sockets: listening, and bytes of one client.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, RecvFlags, SendFlags, Shutdown, sockopt};

use crate::{Error, Result};

/// Bytes the kernel may hold for a client of a unix socket: with its default of 208 KiB a reply of
/// 1 MiB takes several turns of both sides.
const SEND_BUFFER: usize = 2 << 20;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket; one that a process left behind is replaced.
    Unix(PathBuf),
    /// A TCP port on a local address.
    Tcp(SocketAddr),
}

/// A listening socket. The file of a unix socket is removed with it.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    address: Address,
    /// Device and inode of a unix socket's file: another process may have put its own in its place.
    file: Option<(u64, u64)>,
}

impl Listener {
    pub(super) fn bind(address: &Address) -> Result<Self> {
        match address {
            Address::Unix(path) => {
                let failed = |source| Error::Io {
                    operation: "bind of a socket",
                    filename: path.display().to_string(),
                    offset: 0,
                    source,
                };
                remove_stale(path).map_err(failed)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self { fd: listener.into(), address: address.clone(), file: socket_file(path) })
            }
            Address::Tcp(at) => {
                let failed = |source| Error::Io {
                    operation: "bind of a socket",
                    filename: at.to_string(),
                    offset: 0,
                    source,
                };
                let listener = TcpListener::bind(at).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                // Port 0 became another.
                let at = listener.local_addr().map_err(failed)?;
                Ok(Self { fd: listener.into(), address: Address::Tcp(at), file: None })
            }
        }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// A client that waits, `None` if it went away again: who accepts is to wait for nothing but what wakes it.
    pub(super) fn accept(&self) -> io::Result<Option<Socket>> {
        match net::accept_with(&self.fd, net::SocketFlags::CLOEXEC) {
            Ok(fd) => Ok(Some(Socket::new(fd, matches!(self.address, Address::Tcp(_))))),
            Err(
                rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR | rustix::io::Errno::AGAIN,
            ) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address
            && self.file.is_some()
            && socket_file(path) == self.file
        {
            // It may be gone already, which is as well.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Device and inode of a path that is a socket.
fn socket_file(path: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    meta.file_type().is_socket().then(|| (meta.dev(), meta.ino()))
}

/// Removes a socket's file that nobody listens on: a process that was killed leaves it behind.
fn remove_stale(path: &Path) -> io::Result<()> {
    if socket_file(path).is_none() {
        return Ok(());
    }
    let flags = net::SocketFlags::CLOEXEC | net::SocketFlags::NONBLOCK;
    let probe = net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, flags, None)?;
    match net::connect(&probe, &net::SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED) => std::fs::remove_file(path),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        // A full backlog says that someone is there.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "another server is listening on it"))
        }
        Err(error) => Err(error.into()),
    }
}

/// A client's socket. Blocking, but each call says whether to wait.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

/// What became of a call that does not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    /// That many bytes, at least one.
    Bytes(usize),
    /// Nothing is there, or there is no room.
    Nothing,
    /// The other side has closed.
    End,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd, tcp: bool) -> Self {
        // Optimisations all: a socket works without them.
        if tcp {
            let _ = sockopt::set_tcp_nodelay(&fd, true);
            let _ = sockopt::set_socket_keepalive(&fd, true);
        } else {
            let _ = sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER);
        }
        Self(fd)
    }

    /// Receives into the parts one after another; `wait` until something comes.
    pub(super) fn recv(&self, parts: &mut [IoSliceMut<'_>], wait: bool) -> io::Result<Moved> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        // The kernel has less to look at in a call for one buffer.
        let received = if let [part] = parts {
            net::recv(&self.0, &mut **part, flags).map(|(bytes, _)| bytes)
        } else {
            let mut control = net::RecvAncillaryBuffer::default();
            net::recvmsg(&self.0, parts, &mut control, flags).map(|message| message.bytes)
        };
        match received {
            Ok(0) => Ok(Moved::End),
            Ok(n) => Ok(Moved::Bytes(n)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Moved::Nothing),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends as much of the parts as there is room for.
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<Moved> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = if let [part] = parts {
            net::send(&self.0, part, flags)
        } else {
            net::sendmsg(&self.0, parts, &mut net::SendAncillaryBuffer::default(), flags)
        };
        match sent {
            Ok(0) => Ok(Moved::Nothing),
            Ok(n) => Ok(Moved::Bytes(n)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Moved::Nothing),
            Err(e) => Err(e.into()),
        }
    }

    /// Ends both directions: whoever waits on the socket wakes.
    pub(super) fn shutdown(&self) {
        // It may have ended already.
        let _ = net::shutdown(&self.0, Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors is ready for what it is paired with, or the time has come.
pub(super) fn wait(fds: &[(BorrowedFd<'_>, PollFlags)], until: Option<Instant>) -> io::Result<()> {
    let mut polled: Vec<_> =
        fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    // Rounded up: with a timeout of zero the caller would spin until the time has come.
    let left = left.map(|left| left + Duration::from_micros(1));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_use_is_left_alone_and_one_left_behind_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let address = Address::Unix(path.clone());
        // Closed without its file being removed, as by a process that was killed.
        drop(UnixListener::bind(&path).unwrap());
        let first = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err().to_string();
        assert!(error.contains("another server is listening on it"), "{error}");
        // Somebody took the file away and listens there: it is not ours to remove.
        std::fs::remove_file(&path).unwrap();
        let second = Listener::bind(&address).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}
