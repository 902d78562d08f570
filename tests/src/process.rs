//! Waiting for what a process does, by the kernel's word and not by looking again and again.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// What came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The file is there.
    File,
    /// The process has ended.
    End,
    /// Neither, in the time given.
    Nothing,
}

/// A directory in which files will appear. To be made before the process that makes them starts.
pub struct Watch {
    inotify: File,
}

impl Watch {
    /// Watches `dir`.
    pub fn new(dir: &Path) -> Self {
        // SAFETY: makes a descriptor, touches no memory.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        assert!(fd >= 0, "inotify: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just made, and nobody else has it.
        let inotify = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let path = CString::new(dir.as_os_str().as_bytes()).unwrap();
        let events = libc::IN_CREATE | libc::IN_MOVED_TO;
        // SAFETY: the path is a string that ends with NUL and lives during the call.
        let watch = unsafe { libc::inotify_add_watch(fd, path.as_ptr(), events) };
        assert!(watch >= 0, "inotify: {}", std::io::Error::last_os_error());
        Self { inotify }
    }

    /// Waits until `file` is in the directory or `child` has ended.
    pub fn wait(&mut self, file: &Path, child: &Child, patience: Duration) -> Awaited {
        let ended = pidfd(child);
        let deadline = Instant::now() + patience;
        loop {
            if file.exists() {
                return Awaited::File;
            }
            let ready = poll(&[self.inotify.as_raw_fd(), ended.as_raw_fd()], deadline);
            match ready {
                None => return Awaited::Nothing,
                Some(1) => return Awaited::End,
                // What appeared is looked for above; here the events only need to go.
                Some(_) => while self.inotify.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {},
            }
        }
    }
}

/// Waits for the end of a process; false if it did not end in time.
pub fn wait_for_end(child: &Child, patience: Duration) -> bool {
    poll(&[pidfd(child).as_raw_fd()], Instant::now() + patience).is_some()
}

/// A descriptor that is readable when the process has ended.
fn pidfd(child: &Child) -> OwnedFd {
    // SAFETY: makes a descriptor, touches no memory; the child is not waited for while borrowed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    let fd = RawFd::try_from(fd).unwrap();
    assert!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The index of the first descriptor that is readable; `None` at the deadline.
pub fn poll(fds: &[RawFd], deadline: Instant) -> Option<usize> {
    let entry = |fd: &RawFd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 };
    let mut polled: Vec<libc::pollfd> = fds.iter().map(entry).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        let count = libc::nfds_t::try_from(polled.len()).unwrap();
        // SAFETY: the array has that many elements and lives during the call.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, millis) };
        if ready > 0 {
            return polled.iter().position(|entry| entry.revents != 0);
        }
        if left.is_zero() {
            return None;
        }
    }
}
