//! A serial port on a listening unix socket.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::outbox::{Outbox, Reader};
use super::{Input, is_transient, new_event};

/// The client of the moment. The event loop replaces it; the serial port writes to it.
type Current = Arc<Mutex<Option<Arc<Client>>>>;

/// A client; what is kept for it goes with it.
struct Client {
    /// Where it is read from.
    stream: UnixStream,
    /// The way to it: over a descriptor of its own, which is watched by itself.
    outbox: Outbox,
}

impl Client {
    fn new(stream: UnixStream, waits: &Arc<EventFd>) -> io::Result<Arc<Self>> {
        stream.set_nonblocking(true)?;
        let outbox = Outbox::new(Box::new(stream.try_clone()?), Arc::clone(waits));
        Ok(Arc::new(Self { stream, outbox }))
    }
}

impl Reader for UnixStream {
    fn offer(&self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }
}

/// A listening socket with one client at a time; the next waits in the backlog.
pub struct SocketConsole {
    path: PathBuf,
    listener: UnixListener,
    client: Current,
    /// A client that is gone, open until [`SocketConsole::close_ended`].
    ended: Option<Arc<Client>>,
    /// Told when output waits for a client.
    waits: Arc<EventFd>,
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
        let (client, waits) = (Current::default(), new_event()?);
        Ok(Self { path: path.to_owned(), listener, client, ended: None, waits })
    }

    /// Blocks until a client is there.
    pub fn wait_for_client(&self) -> io::Result<()> {
        self.listener.set_nonblocking(false)?;
        let accepted = self.listener.accept();
        self.listener.set_nonblocking(true)?;
        let (stream, _) = accepted?;
        *lock(&self.client) = Some(Client::new(stream, &self.waits)?);
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
            Some(client) => vec![client.stream.as_raw_fd()],
            None => vec![self.listener.as_raw_fd()],
        }
    }

    /// Takes a new client, or reads from the one there is. After [`Input::End`] the descriptors to
    /// watch have changed.
    pub fn read(&mut self, fd: RawFd, buf: &mut [u8]) -> Input {
        if fd == self.listener.as_raw_fd() {
            let accepted = self.listener.accept();
            return match accepted.and_then(|(stream, _)| Client::new(stream, &self.waits)) {
                Ok(client) => {
                    *lock(&self.client) = Some(client);
                    Input::End
                }
                Err(_) => Input::Nothing,
            };
        }
        let client = lock(&self.client).clone();
        let read = client.map_or(Ok(0), |client| (&client.stream).read(buf));
        match read {
            Ok(count) if count > 0 => Input::Bytes(count),
            Err(error) if is_transient(&error) => Input::Nothing,
            _ => {
                self.ended = lock(&self.client).take();
                Input::End
            }
        }
    }

    /// See [`super::Console::output_waits`].
    pub fn output_waits(&self) -> &EventFd {
        &self.waits
    }

    /// See [`super::Console::output_fd`].
    pub fn output_fd(&self) -> Option<RawFd> {
        lock(&self.client).as_ref().map(|client| client.outbox.fd())
    }

    /// See [`super::Console::send_kept`].
    pub fn send_kept(&self) -> bool {
        let client = lock(&self.client).clone();
        client.is_some_and(|client| client.outbox.send_kept())
    }

    /// See [`super::Console::finish`].
    pub fn finish(&self) {
        let client = lock(&self.client).clone();
        if let Some(client) = client {
            client.outbox.finish();
        }
    }

    /// See [`super::Console::ended_output_fd`].
    pub fn ended_output_fd(&self) -> Option<RawFd> {
        self.ended.as_ref().map(|client| client.outbox.fd())
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

fn lock(client: &Current) -> MutexGuard<'_, Option<Arc<Client>>> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to the client of the moment; without one the bytes go nowhere, as on an open cable.
pub struct SocketOutput {
    client: Current,
}

impl Write for SocketOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // The lock is given back before the write: a slow client must not hold up the event loop.
        let client = lock(&self.client).clone();
        if let Some(client) = client {
            client.outbox.write(buf);
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
        assert_eq!(console.output_waits().read().unwrap(), 1);
        let fd = console.output_fd().unwrap();
        assert_ne!(fd, console.watched()[0]);
        assert!(console.send_kept());
        // What is kept goes with the client.
        drop(client);
        let input = console.watched()[0];
        assert_eq!(console.read(input, &mut [0; 1]), Input::End);
        assert_eq!((console.output_fd(), console.ended_output_fd()), (None, Some(fd)));
        assert!(is_open(fd), "the event loop could not forget a closed descriptor");
        console.close_ended();
        assert!(!is_open(fd));
        assert!(!console.send_kept());
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
