//! The io_uring of a queue.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, types};

/// Transfers on the ring at once.
pub(super) const ENTRIES: u32 = 128;

/// Most buffers the kernel takes in one transfer (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// A ring, and how many transfers the kernel has.
pub(super) struct Ring {
    ring: IoUring,
    queued: usize,
    pub(super) in_flight: usize,
}

/// A transfer that ended: its key, and bytes or the error.
pub(super) type Ended = (u64, io::Result<u64>);

impl Ring {
    /// A ring, if the host allows one.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            // Completions are looked for after system calls only: no interrupts are needed.
            .setup_coop_taskrun()
            .build(ENTRIES)
            // Before Linux 5.19.
            .or_else(|_| IoUring::new(ENTRIES))?;
        // Else completions could be lost, or the buffers' list be read after the submission.
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, queued: 0, in_flight: 0 })
    }

    /// Readable while completions wait.
    pub(super) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Whether no further transfer fits.
    pub(super) fn is_full(&self) -> bool {
        self.in_flight + self.queued >= ENTRIES as usize
    }

    /// Queues a transfer; [`Ring::submit`] starts it. The ring must not be full.
    ///
    /// # Safety
    /// The buffers must stay valid until the transfer has ended: writable for a read, readable for
    /// a write. `bufs` itself and the descriptor must stay until [`Ring::submit`] has returned.
    pub(super) unsafe fn push(
        &mut self,
        key: u64,
        write: bool,
        fd: BorrowedFd<'_>,
        bufs: &[libc::iovec],
        offset: u64,
    ) -> io::Result<()> {
        let fd = types::Fd(fd.as_raw_fd());
        let count = u32::try_from(bufs.len().min(MAX_IOVECS)).unwrap_or(1);
        let entry = if write {
            opcode::Writev::new(fd, bufs.as_ptr(), count).offset(offset).build()
        } else {
            opcode::Readv::new(fd, bufs.as_ptr(), count).offset(offset).build()
        };
        let entry = entry.user_data(key);
        // SAFETY: the caller vouches for buffers and descriptor.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        self.queued += 1;
        Ok(())
    }

    /// Starts what is queued, and waits until `want` transfers have ended.
    pub(super) fn submit(&mut self, want: usize) -> io::Result<()> {
        while self.queued > 0 || want > 0 {
            let sent = match self.ring.submit_and_wait(want) {
                Ok(sent) => sent,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) if self.queued > 0 => continue,
                    Some(libc::EINTR) => return Ok(()),
                    // The kernel wants completions taken first, or has no memory right now.
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_flight > 0 => return Ok(()),
                    _ => return Err(e),
                },
            };
            let sent = sent.min(self.queued);
            self.queued -= sent;
            self.in_flight += sent;
            if want > 0 && self.queued == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Takes the transfers that have ended.
    pub(super) fn ended(&mut self, into: &mut Vec<Ended>) {
        for entry in self.ring.completion() {
            self.in_flight = self.in_flight.saturating_sub(1);
            let result = match u64::try_from(entry.result()) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            into.push((entry.user_data(), result));
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}
