//! One transfer between memory and a file: of one request, or of several that are neighbours there.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::num::{to_u64, to_usize};
use crate::storage::{FileStorage, Storage, sys};
use crate::{Error, ReadBuf, Result, WriteBuf, iobuf};

/// Bytes up to which neighbours are joined; one request may be larger.
const MAX_JOINED: u64 = 1 << 20;
/// The same for writes through the page cache: they gain little from it, what is copied from should still
/// be in the processor's, and large ones take large pages, which a host finds less easily.
const MAX_JOINED_COPY: u64 = 64 << 10;
/// Buffers up to which neighbours are joined.
const MAX_JOINED_IOVECS: usize = 256;

/// What of a transfer belongs to one request.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// The request's key.
    pub(super) request: usize,
    iovs: Range<usize>,
    len: u64,
}

/// Memory of a transfer's lists, which are empty.
#[derive(Debug, Default)]
pub(super) struct Lists {
    iovs: Vec<libc::iovec>,
    parts: Vec<Part>,
}

// SAFETY: there is no pointer in it.
unsafe impl Send for Lists {}

/// See the module. The memory belongs to the requests of its parts, which live until it has ended.
#[derive(Debug)]
pub(super) struct Transfer {
    storage: Arc<dyn Storage>,
    pub(super) write: bool,
    offset: u64,
    len: u64,
    done: u64,
    iovs: Vec<libc::iovec>,
    /// What the next system call is given, if that is not all of them.
    next: Vec<libc::iovec>,
    parts: Vec<Part>,
    /// Direct I/O was refused by the file system.
    refused: bool,
}

// SAFETY: the pointers lead to memory of OwnedBufs and of copies, which are Send, or to static zeroes.
unsafe impl Send for Transfer {}

/// What comes next for a transfer.
#[derive(Debug)]
pub(super) enum Step {
    /// It has ended well.
    Done,
    /// It has to go on where it is.
    Again,
    /// It has failed.
    Failed(io::Error),
}

impl Transfer {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        write: bool,
        offset: u64,
        Lists { iovs, parts }: Lists,
    ) -> Self {
        let next = Vec::new();
        Self { storage, write, offset, len: 0, done: 0, iovs, next, parts, refused: false }
    }

    /// What is left of it for the next.
    pub(super) fn emptied(mut self) -> Lists {
        self.iovs.clear();
        self.parts.clear();
        Lists { iovs: self.iovs, parts: self.parts }
    }

    /// Whether bytes at that place can be joined to this transfer.
    pub(super) fn continues(
        &self,
        storage: &Arc<dyn Storage>,
        write: bool,
        offset: u64,
        len: u64,
    ) -> bool {
        self.offset + self.len == offset
            && self.write == write
            && self.len + len <= self.most()
            && self.iovs.len() < MAX_JOINED_IOVECS
            && Arc::as_ptr(&self.storage).addr() == Arc::as_ptr(storage).addr()
    }

    /// Bytes up to which others are joined.
    fn most(&self) -> u64 {
        match self.file() {
            Some(file) if self.write && !file.options().direct => MAX_JOINED_COPY,
            _ => MAX_JOINED,
        }
    }

    /// Bytes that go through the page cache of a file; none if they may bypass it.
    pub(super) fn buffered_len(&self) -> u64 {
        self.file().filter(|file| !file.options().direct).map_or(0, |_| self.len)
    }

    /// Adds a part of a request at the end.
    pub(super) fn push(&mut self, request: usize, fill: impl FnOnce(&mut Vec<libc::iovec>)) {
        let start = self.iovs.len();
        fill(&mut self.iovs);
        let iovs = start..self.iovs.len();
        let len = self.iovs[iovs.clone()].iter().map(|part| to_u64(part.iov_len)).sum();
        self.len += len;
        self.parts.push(Part { request, iovs, len });
    }

    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The parts as transfers of their own, to find out which of them fails.
    pub(super) fn split(&self) -> Vec<Self> {
        let mut offset = self.offset;
        let mut out = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let mut one = Self::new(self.storage.clone(), self.write, offset, Lists::default());
            one.push(part.request, |iovs| iovs.extend_from_slice(&self.iovs[part.iovs.clone()]));
            offset += part.len;
            out.push(one);
        }
        out
    }

    /// The error for the requests.
    pub(super) fn error(&self, source: io::Error) -> Error {
        Error::Io {
            operation: if self.write { "write" } else { "read" },
            filename: self.storage.name().to_owned(),
            offset: self.offset + self.done,
            source,
        }
    }

    /// The file it is from or to, if it is one.
    pub(super) fn file(&self) -> Option<&FileStorage> {
        self.storage.file()
    }

    /// Nothing more is added to it. A file whose calls are limited gets a part at first.
    pub(super) fn close(&mut self) {
        if self.file().is_some_and(|file| file.at_once(self.len) < self.len) {
            self.next = self.cut(true);
        }
    }

    /// What comes next: descriptor, whether it is direct, buffers and offset.
    pub(super) fn next<'a>(
        &'a self,
        file: &'a FileStorage,
    ) -> (BorrowedFd<'a>, bool, &'a [libc::iovec], u64) {
        let offset = self.offset + self.done;
        let iovs = if self.next.is_empty() { &self.iovs } else { &self.next };
        let parts = iovs.iter().map(|iov| (iov.iov_base.cast_const().cast::<u8>(), iov.iov_len));
        let (fd, direct) = file.descriptor(offset, parts, self.refused);
        (fd, direct, iovs, offset)
    }

    /// Transfers what the page cache lets it without waiting for the disk: reads of what is there,
    /// and writes. Direct transfers always wait.
    pub(super) fn inline(&mut self) -> Step {
        loop {
            let Some(file) = self.storage.file() else {
                return Step::Again;
            };
            let (fd, direct, iovs, offset) = self.next(file);
            if direct {
                return Step::Again;
            }
            let moved = if self.write {
                sys::pwritev(fd, write_bufs(iovs), offset)
            } else {
                sys::preadv_cached(fd, read_bufs(iovs), offset)
            };
            match moved {
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) if !self.write && would_wait(&e) => return Step::Again,
                moved => match self.moved(moved) {
                    Step::Again => {}
                    step => return step,
                },
            }
        }
    }

    /// Takes note of what the kernel did of the rest.
    pub(super) fn moved(&mut self, moved: io::Result<u64>) -> Step {
        match moved {
            Ok(0) if self.write => Step::Failed(io::ErrorKind::WriteZero.into()),
            Ok(0) => {
                // Past the end of the file.
                iobuf::fill_zero(read_bufs(&self.cut(false)));
                self.done = self.len;
                Step::Done
            }
            Ok(n) => {
                self.done = (self.done + n).min(self.len);
                if let (true, Some(file)) = (self.write, self.file()) {
                    file.wrote_up_to(self.offset + self.done);
                }
                if self.done == self.len {
                    return Step::Done;
                }
                self.next = self.cut(true);
                Step::Again
            }
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => Step::Again,
                // The file system refuses, or the file ends off the block grid and the transfer had
                // to go on unaligned.
                Some(libc::EINVAL) if !self.refused => {
                    self.refused = true;
                    Step::Again
                }
                _ => Step::Failed(e),
            },
        }
    }

    /// The buffers without what is done: all of the rest, or what one call is given of it.
    fn cut(&self, for_call: bool) -> Vec<libc::iovec> {
        let mut left = self.len - self.done;
        if let Some(file) = self.file().filter(|_| for_call) {
            left = file.at_once(left);
        }
        let (mut skip, mut left) = (to_usize(self.done), to_usize(left));
        let mut out = Vec::with_capacity(self.iovs.len());
        for iov in &self.iovs {
            let passed = skip.min(iov.iov_len);
            skip -= passed;
            let iov_len = (iov.iov_len - passed).min(left);
            left -= iov_len;
            if iov_len > 0 {
                out.push(libc::iovec { iov_base: iov.iov_base.wrapping_byte_add(passed), iov_len });
            }
        }
        out
    }

    /// Does what is left, waiting for it.
    pub(super) fn wait(&self) -> Result<()> {
        let offset = self.offset + self.done;
        let rest = if self.done == 0 { None } else { Some(self.cut(false)) };
        let iovs = rest.as_deref().unwrap_or(&self.iovs);
        if self.write {
            self.storage.write_at(offset, write_bufs(iovs))
        } else {
            self.storage.read_at(offset, read_bufs(iovs))
        }
    }
}

/// Whether the kernel would have had to wait, or cannot tell.
fn would_wait(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::ENOSYS))
}

/// The buffers of a transfer that reads.
fn read_bufs(iovs: &[libc::iovec]) -> &[ReadBuf<'_>] {
    // SAFETY: ReadBuf is repr(transparent) over iovec. The memory is owned by requests that live
    // until the transfer has ended, and came to them as writable.
    unsafe { std::slice::from_raw_parts(iovs.as_ptr().cast(), iovs.len()) }
}

/// The buffers of a transfer that writes.
fn write_bufs(iovs: &[libc::iovec]) -> &[WriteBuf<'_>] {
    // SAFETY: as in `read_bufs`, for memory that is readable.
    unsafe { std::slice::from_raw_parts(iovs.as_ptr().cast(), iovs.len()) }
}
