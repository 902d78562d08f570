//! Scatter-gather buffers that may be guest memory.
//!
//! Guest memory can change under us at any moment, so no Rust reference to it may exist. These
//! types carry pointer and length only: the kernel (preadv, pwritev, io_uring) and byte copies
//! through raw pointers are all that ever touches what they point to.

use std::marker::PhantomData;

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
        Self {
            iov: libc::iovec {
                iov_base: ptr.cast(),
                iov_len: len,
            },
            _memory: PhantomData,
        }
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
            iov: libc::iovec {
                iov_base: ptr.cast_mut().cast(),
                iov_len: len,
            },
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
