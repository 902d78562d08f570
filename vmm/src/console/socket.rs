//! A serial port on a listening unix socket.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Input, PATIENCE, is_transient, writable_within};

/// The client of the moment. The event loop replaces it; the serial port writes to it.
type Client = Arc<Mutex<Option<Arc<UnixStream>>>>;

/// A listening socket with one client at a time; the next waits in the backlog.
pub struct SocketConsole {
    path: PathBuf,
    listener: UnixListener,
    client: Client,
    /// A client that is gone, open until [`SocketConsole::close_ended`].
    ended: Option<Arc<UnixStream>>,
}

impl SocketConsole {
    /// Makes the socket. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// The path is in use, or not writable.
    pub fn listen(path: &Path) -> io::Result<Self> {
        let is_socket = fs::symlink_metadata(path)
            .is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()));
        if is_socket && UnixStream::connect(path).is_err() {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { path: path.to_owned(), listener, client: Client::default(), ended: None })
    }

    /// Blocks until a client is there.
    pub fn wait_for_client(&self) -> io::Result<()> {
        self.listener.set_nonblocking(false)?;
        let accepted = self.listener.accept();
        self.listener.set_nonblocking(true)?;
        let (stream, _) = accepted?;
        stream.set_nonblocking(true)?;
        *lock(&self.client) = Some(Arc::new(stream));
        Ok(())
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The address as QEMU writes it.
    pub fn address(&self) -> String {
        let state = if lock(&self.client).is_some() { "" } else { "disconnected:" };
        format!("{state}unix:{},server=on", self.path.display())
    }

    /// The serial port's end.
    pub fn output(&self) -> SocketOutput {
        SocketOutput { client: Arc::clone(&self.client) }
    }

    /// The client where there is one, else the listener.
    pub fn watched(&self) -> Vec<RawFd> {
        match lock(&self.client).as_ref() {
            Some(stream) => vec![stream.as_raw_fd()],
            None => vec![self.listener.as_raw_fd()],
        }
    }

    /// Takes a new client, or reads from the one there is. After [`Input::End`] the descriptors to
    /// watch have changed.
    pub fn read(&mut self, fd: RawFd, buf: &mut [u8]) -> Input {
        if fd == self.listener.as_raw_fd() {
            return match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    *lock(&self.client) = Some(Arc::new(stream));
                    Input::End
                }
                _ => Input::Nothing,
            };
        }
        let client = lock(&self.client).clone();
        let read = client.as_deref().map_or(Ok(0), |mut stream| stream.read(buf));
        match read {
            Ok(count) if count > 0 => Input::Bytes(count),
            Err(error) if is_transient(&error) => Input::Nothing,
            _ => {
                self.ended = lock(&self.client).take();
                Input::End
            }
        }
    }

    /// Closes what [`Input::End`] was about. The caller has stopped watching it: an event loop that
    /// still knows the descriptor would take the next file of that number for it.
    pub fn close_ended(&mut self) {
        self.ended = None;
    }
}

impl Drop for SocketConsole {
    fn drop(&mut self) {
        // Someone may have removed it already.
        let _ = fs::remove_file(&self.path);
    }
}

fn lock(client: &Client) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to the client of the moment; without one the bytes go nowhere, as on an open cable.
pub struct SocketOutput {
    client: Client,
}

impl Write for SocketOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // The lock is given back before the write: a slow client must not hold up the event loop.
        let Some(stream) = lock(&self.client).clone() else { return Ok(buf.len()) };
        let deadline = Instant::now() + PATIENCE;
        let mut rest = buf;
        while !rest.is_empty() {
            match (&*stream).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() || !writable_within(&*stream, left) {
                        break;
                    }
                }
                // The client is gone; the event loop sees it, too, and forgets it.
                Err(_) => break,
            }
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_sends_and_receives_and_the_next_one_follows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let mut console = SocketConsole::listen(&path).unwrap();
        let mut output = console.output();
        output.write_all(b"nobody hears this").unwrap();
        for text in [b"first", b"other"] {
            let mut client = UnixStream::connect(&path).unwrap();
            let listener = console.watched()[0];
            let mut buf = [0; 16];
            let address = format!("unix:{},server=on", path.display());
            assert_eq!(console.address(), format!("disconnected:{address}"));
            assert_eq!(console.read(listener, &mut buf), Input::End);
            assert_eq!(console.address(), address);
            client.write_all(text).unwrap();
            let fd = console.watched()[0];
            assert_eq!(console.read(fd, &mut buf), Input::Bytes(5));
            assert_eq!(&buf[..5], text);
            output.write_all(b"hello").unwrap();
            client.read_exact(&mut buf[..5]).unwrap();
            assert_eq!(&buf[..5], b"hello");
            drop(client);
            assert_eq!(console.read(fd, &mut buf), Input::End);
            assert!(is_open(fd), "the event loop could not forget a closed descriptor");
            console.close_ended();
            assert!(!is_open(fd));
        }
    }

    fn is_open(fd: RawFd) -> bool {
        // SAFETY: F_GETFD only asks; a number that is no descriptor is an error.
        unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
    }

    #[test]
    fn output_to_a_client_that_does_not_read_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let mut console = SocketConsole::listen(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let listener = console.watched()[0];
        assert_eq!(console.read(listener, &mut [0; 1]), Input::End);
        let block = vec![0; 4 << 20];
        console.output().write_all(&block).unwrap();
        drop(client);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        drop(UnixListener::bind(&path).unwrap());
        let live = SocketConsole::listen(&path).unwrap();
        assert!(SocketConsole::listen(&path).is_err());
        drop(live);
        assert!(!path.exists());
    }
}
