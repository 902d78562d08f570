//! Signals that come before the main loop does.
//!
//! From its beginning the process takes the signals that end it, so that none of them leaves files behind that are
//! made meanwhile. While the machine is put together, which may wait for a client or a disk for ever, a thread
//! watches: a signal removes these files, and then ends the process as it would have at once. The main
//! loop takes over from there.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The signals that end a machine.
const SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// See the module. Dropping it, after an error, leaves files to their owners.
pub struct Early {
    signals: UnixStream,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// The thread is to end.
    over: EventFd,
    /// The signal that came last.
    signal: Arc<AtomicUsize>,
    files: Mutex<Vec<PathBuf>>,
    sockets: Mutex<Vec<Socket>>,
}

/// A socket that is about to be made.
struct Socket {
    path: PathBuf,
    /// Device and inode of what is there before.
    before: Option<(u64, u64)>,
}

impl Early {
    /// Takes the signals from now on. `sockets` are files that will be made, and are somebody else's as long as
    /// they are as they are now.
    ///
    /// # Errors
    /// The host has no descriptors or threads to give.
    pub fn begin(sockets: impl IntoIterator<Item = PathBuf>) -> io::Result<Self> {
        let (signals, sender) = UnixStream::pair()?;
        let signal = Arc::new(AtomicUsize::new(0));
        for number in SIGNALS {
            let value = usize::try_from(number).unwrap_or_default();
            // In this order: who hears of one finds which.
            signal_hook::flag::register_usize(number, Arc::clone(&signal), value)?;
            signal_hook::low_level::pipe::register(number, sender.try_clone()?)?;
        }
        let sockets = sockets.into_iter().map(|path| Socket { before: inode(&path), path });
        let shared = Arc::new(Shared {
            over: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            signal,
            files: Mutex::default(),
            sockets: Mutex::new(sockets.collect()),
        });
        let theirs = Arc::clone(&shared);
        let watched = signals.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("early-signals".to_owned())
            .spawn(move || theirs.watch(&watched))?;
        Ok(Self { signals, shared, thread: Some(thread) })
    }

    /// This file was made, and is to be removed.
    pub fn made(&self, path: &Path) {
        self.shared.files.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    }

    /// This file was made, and is to stay.
    pub fn keep(&self, path: &Path) {
        let mut files = self.shared.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|file| file != path);
    }

    /// The machine is whole: gives what becomes readable when a signal comes, or has come.
    pub fn end(mut self) -> io::Result<UnixStream> {
        self.stop();
        self.signals.try_clone()
    }

    fn stop(&mut self) {
        // The only way to fail is a counter at its limit, which wakes too.
        let _ = self.shared.over.write(1);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watches for signals has panicked");
        }
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn watch(&self, signals: &UnixStream) {
        if wait(self.over.as_raw_fd(), signals.as_raw_fd()) {
            return;
        }
        self.clean();
        let signal = i32::try_from(self.signal.load(Ordering::Acquire)).unwrap_or(SIGTERM);
        if let Err(error) = signal_hook::low_level::emulate_default_handler(signal) {
            tracing::error!("signal {signal} does not end the process: {error}");
        }
    }

    fn clean(&self) {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = sockets.iter().filter(|socket| inode(&socket.path) != socket.before);
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        for path in files.iter().chain(ours.map(|socket| &socket.path)) {
            // It may be gone already, or not be there yet.
            let _ = fs::remove_file(path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Waits until one of them is readable; tells whether the first is.
fn wait(first: RawFd, other: RawFd) -> bool {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(first), poll(other)];
    loop {
        // SAFETY: the array has two entries.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if ready > 0 {
            return fds[0].revents != 0;
        }
        if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return true;
        }
    }
}
