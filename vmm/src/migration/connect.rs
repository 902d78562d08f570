//! Connecting to sockets without waiting where nobody takes connections.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::output::is_transient;
use super::wait::Stopper;

/// How long until a socket with too many clients is tried again: the kernel tells nobody when it has
/// room.
const AGAIN: Duration = Duration::from_millis(50);

/// Connects to who listens there, in non-blocking mode.
///
/// # Errors
/// Nobody listens; or too many wait there already, which is [`io::ErrorKind::WouldBlock`]. A socket in
/// blocking mode would wait, for as long as it takes.
pub(super) fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

/// As [`try_connect`], waiting until there is room.
///
/// # Errors
/// Nobody listens; or it was told to stop.
pub(super) fn connect(path: &Path, stopper: &Stopper) -> io::Result<UnixStream> {
    loop {
        match try_connect(path) {
            Err(error) if is_transient(&error) => stopper.rest(AGAIN)?,
            other => return other,
        }
    }
}
