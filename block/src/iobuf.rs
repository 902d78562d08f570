//! Scatter-gather buffers that may be guest memory.
//!
//! Guest memory can change under us at any moment, so no Rust reference to it may exist. These
//! types carry pointer and length only: the kernel (preadv, pwritev, io_uring) and byte copies
//! through raw pointers are all that ever touches what they point to.

use std::marker::PhantomData;

use crate::num::to_usize;

/// A buffer that a read fills.
#[derive(Debug)]
#[repr(transparent)]
pub struct ReadBuf<'a> {
    iov: libc::iovec,
    _memory: PhantomData<&'a mut [u8]>,
}

/// A buffer that a write takes its data from.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct WriteBuf<'a> {
    iov: libc::iovec,
    _memory: PhantomData<&'a [u8]>,
}

// SAFETY: a ReadBuf is a pointer to memory that its creator vouched for being valid and writable
// for 'a from any thread; nothing about it is tied to one thread.
unsafe impl Send for ReadBuf<'_> {}
// SAFETY: as for Send; a shared ReadBuf gives out only the raw pointer.
unsafe impl Sync for ReadBuf<'_> {}
// SAFETY: a WriteBuf is a pointer to memory that is readable for 'a from any thread.
unsafe impl Send for WriteBuf<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for WriteBuf<'_> {}

impl<'a> ReadBuf<'a> {
    /// A buffer over memory that only this program writes.
    pub fn new(buf: &'a mut [u8]) -> Self {
        // SAFETY: an exclusive borrow is valid for writes for its lifetime.
        unsafe { Self::from_raw(buf.as_mut_ptr(), buf.len()) }
    }

    /// A buffer over memory that others may access at the same time, such as guest memory.
    ///
    /// # Safety
    /// `ptr..ptr + len` must stay mapped and writable for `'a`, and no Rust reference to it may
    /// exist while the buffer is in use.
    pub unsafe fn from_raw(ptr: *mut u8, len: usize) -> Self {
        Self { iov: libc::iovec { iov_base: ptr.cast(), iov_len: len }, _memory: PhantomData }
    }

    /// Where the buffer starts.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.iov.iov_base.cast()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.iov.iov_len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> WriteBuf<'a> {
    /// A buffer over ordinary memory.
    pub fn new(buf: &'a [u8]) -> Self {
        // SAFETY: a shared borrow is valid for reads for its lifetime.
        unsafe { Self::from_raw(buf.as_ptr(), buf.len()) }
    }

    /// A buffer over memory that others may write at the same time, such as guest memory.
    ///
    /// # Safety
    /// `ptr..ptr + len` must stay mapped and readable for `'a`.
    pub unsafe fn from_raw(ptr: *const u8, len: usize) -> Self {
        Self {
            iov: libc::iovec { iov_base: ptr.cast_mut().cast(), iov_len: len },
            _memory: PhantomData,
        }
    }

    /// Where the buffer starts.
    pub fn as_ptr(&self) -> *const u8 {
        self.iov.iov_base.cast()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.iov.iov_len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What both kinds of buffers have in common.
pub(crate) trait Vectored {
    /// Start and length.
    fn part(&self) -> (*const u8, usize);
}

impl Vectored for ReadBuf<'_> {
    fn part(&self) -> (*const u8, usize) {
        (self.as_mut_ptr().cast_const(), self.len())
    }
}

impl Vectored for WriteBuf<'_> {
    fn part(&self) -> (*const u8, usize) {
        (self.as_ptr(), self.len())
    }
}

/// Length of all buffers together in bytes.
pub(crate) fn total_len<T: Vectored>(bufs: &[T]) -> u64 {
    bufs.iter().map(|b| b.part().1 as u64).sum()
}

/// Start and length of what `skip..skip + len` covers of each buffer. Ends early with the buffers.
fn parts<T: Vectored>(bufs: &[T], skip: u64, len: u64) -> Vec<(*const u8, usize)> {
    let mut skip = to_usize(skip);
    let mut len = to_usize(len);
    let mut out = Vec::with_capacity(bufs.len().min(16));
    for (ptr, part_len) in bufs.iter().map(Vectored::part) {
        if len == 0 {
            break;
        }
        if skip >= part_len {
            skip -= part_len;
            continue;
        }
        let take = (part_len - skip).min(len);
        out.push((ptr.wrapping_add(skip), take));
        len -= take;
        skip = 0;
    }
    out
}

/// The part `skip..skip + len` of the bytes that `bufs` are together.
pub(crate) fn slice_read<'b>(bufs: &'b [ReadBuf<'_>], skip: u64, len: u64) -> Vec<ReadBuf<'b>> {
    parts(bufs, skip, len)
        .into_iter()
        // SAFETY: a part of a valid buffer is valid; it cannot outlive the buffers it is cut from.
        .map(|(ptr, len)| unsafe { ReadBuf::from_raw(ptr.cast_mut(), len) })
        .collect()
}

/// The part `skip..skip + len` of the bytes that `bufs` are together.
pub(crate) fn slice_write<'b>(bufs: &'b [WriteBuf<'_>], skip: u64, len: u64) -> Vec<WriteBuf<'b>> {
    parts(bufs, skip, len)
        .into_iter()
        // SAFETY: a part of a valid buffer is valid; it cannot outlive the buffers it is cut from.
        .map(|(ptr, len)| unsafe { WriteBuf::from_raw(ptr, len) })
        .collect()
}

/// Fills the buffers with zeroes.
pub fn fill_zero(bufs: &[ReadBuf<'_>]) {
    for buf in bufs {
        // SAFETY: the buffer's maker vouched for `len` writable bytes.
        unsafe { std::ptr::write_bytes(buf.as_mut_ptr(), 0, buf.len()) };
    }
}

/// Copies `data` into the buffers, as far as both reach.
pub fn copy_in(bufs: &[ReadBuf<'_>], data: &[u8]) {
    let mut data = data;
    for buf in bufs {
        let (now, rest) = data.split_at(buf.len().min(data.len()));
        // SAFETY: `now` is no longer than the buffer, which its maker vouched for; guest memory
        // never overlaps with memory of this program that a slice borrows.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), buf.as_mut_ptr(), now.len()) };
        data = rest;
    }
}

/// Copies the buffers out to `data`, as far as both reach.
pub fn copy_out(bufs: &[WriteBuf<'_>], data: &mut [u8]) {
    let mut data = data;
    for buf in bufs {
        let (now, rest) = data.split_at_mut(buf.len().min(data.len()));
        // SAFETY: as in `copy_in`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), now.as_mut_ptr(), now.len()) };
        data = rest;
    }
}

/// Whether there is nothing but zeroes in the buffers. Copies first: guest memory may change.
pub(crate) fn is_zero(bufs: &[WriteBuf<'_>]) -> bool {
    const STEP: usize = 4096;
    let mut copy = [0; STEP];
    let total = total_len(bufs);
    let mut done = 0;
    while done < total {
        let now = (total - done).min(STEP as u64);
        let copy = &mut copy[..to_usize(now)];
        copy_out(&slice_write(bufs, done, now), copy);
        if copy.iter().any(|byte| *byte != 0) {
            return false;
        }
        done += now;
    }
    true
}
