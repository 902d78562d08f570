//! Memory that a request owns until it is completed.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt::{self, Debug, Formatter};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::num::{to_u64, to_usize};
use crate::{ReadBuf, WriteBuf, iobuf};

/// Alignment of an [`AlignedBuf`]: what O_DIRECT needs on any current disk.
pub(crate) const BUF_ALIGN: usize = 4096;

/// Bytes aligned for O_DIRECT. Never moves in memory.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory as a Box<[u8]> does.
unsafe impl Send for AlignedBuf {}
// SAFETY: as for Send; shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zeroes.
    pub fn new(len: usize) -> Self {
        let Some(layout) = Self::layout(len) else {
            return Self { ptr: NonNull::dangling(), len: 0 };
        };
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        match NonNull::new(ptr) {
            Some(ptr) => Self { ptr, len },
            None => handle_alloc_error(layout),
        }
    }

    /// `None` for no bytes, or for more than there can be.
    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len, BUF_ALIGN).ok().filter(|layout| layout.size() > 0)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: `new` allocated it with this layout.
            unsafe { dealloc(self.ptr.as_ptr(), layout) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are allocated and initialised, or `len` is 0.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Debug for AlignedBuf {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish()
    }
}

/// A vector taken apart, so that nothing claims its memory while the kernel writes to it.
struct VecParts {
    ptr: *mut u8,
    len: usize,
    capacity: usize,
}

// SAFETY: the parts own the vector's memory.
unsafe impl Send for VecParts {}

impl VecParts {
    fn new(vec: Vec<u8>) -> Self {
        let mut vec = ManuallyDrop::new(vec);
        Self { ptr: vec.as_mut_ptr(), len: vec.len(), capacity: vec.capacity() }
    }

    fn into_vec(self) -> Vec<u8> {
        let parts = ManuallyDrop::new(self);
        // SAFETY: these are the parts of a vector, and are used for one only.
        unsafe { Vec::from_raw_parts(parts.ptr, parts.len, parts.capacity) }
    }
}

impl Drop for VecParts {
    fn drop(&mut self) {
        // SAFETY: as in `into_vec`, which does not drop the parts.
        drop(unsafe { Vec::from_raw_parts(self.ptr, self.len, self.capacity) });
    }
}

/// Who owns the memory.
enum Owner {
    Nobody,
    Vec(VecParts),
    Aligned(AlignedBuf),
    Other(#[expect(dead_code, reason = "kept for its drop")] Box<dyn Any + Send>),
}

/// One buffer needs no allocation.
enum Parts {
    One(libc::iovec),
    Many(Vec<libc::iovec>),
}

/// The buffers of a request, one after another, with what keeps their memory alive.
pub struct OwnedBufs {
    parts: Parts,
    len: u64,
    owner: Owner,
}

// SAFETY: the pointers lead to memory that `owner`, which is Send, keeps alive, or that the caller
// of `from_raw` vouched for from any thread.
unsafe impl Send for OwnedBufs {}

fn iovec(ptr: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: ptr.cast(), iov_len: len }
}

impl OwnedBufs {
    /// No bytes: for requests without data.
    pub fn none() -> Self {
        Self { parts: Parts::Many(Vec::new()), len: 0, owner: Owner::Nobody }
    }

    /// The bytes of a vector; [`OwnedBufs::into_vec`] gives it back.
    pub fn from_vec(vec: Vec<u8>) -> Self {
        let vec = VecParts::new(vec);
        Self {
            parts: Parts::One(iovec(vec.ptr, vec.len)),
            len: to_u64(vec.len),
            owner: Owner::Vec(vec),
        }
    }

    /// An aligned buffer; [`OwnedBufs::into_aligned`] gives it back.
    pub fn from_aligned(buf: AlignedBuf) -> Self {
        Self::aligned_part(buf, usize::MAX)
    }

    /// The first `len` bytes (or all, if there are fewer) of an aligned buffer, which may be larger
    /// than the request so that it serves many.
    pub(crate) fn aligned_part(buf: AlignedBuf, len: usize) -> Self {
        let len = len.min(buf.len);
        Self {
            parts: Parts::One(iovec(buf.ptr.as_ptr(), len)),
            len: to_u64(len),
            owner: Owner::Aligned(buf),
        }
    }

    /// Memory that others may access at the same time, such as guest memory.
    ///
    /// # Safety
    /// Every part must stay mapped as long as `keep` lives, readable for a write and writable for a
    /// read, from any thread. No Rust reference to it may exist while the request is in flight,
    /// other than shared ones for a write.
    pub unsafe fn from_raw(parts: Vec<libc::iovec>, keep: impl Any + Send) -> Self {
        let len = parts.iter().map(|part| to_u64(part.iov_len)).sum();
        Self { parts: Parts::Many(parts), len, owner: Owner::Other(Box::new(keep)) }
    }

    /// Length of all buffers together in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The vector this was made from; `None` if it was not.
    pub fn into_vec(self) -> Option<Vec<u8>> {
        match self.owner {
            Owner::Vec(vec) => Some(vec.into_vec()),
            _ => None,
        }
    }

    /// The aligned buffer this was made from; `None` if it was not.
    pub fn into_aligned(self) -> Option<AlignedBuf> {
        match self.owner {
            Owner::Aligned(buf) => Some(buf),
            _ => None,
        }
    }

    /// The bytes, if they are one buffer that only this program accesses.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match (&self.parts, &self.owner) {
            (Parts::One(part), Owner::Vec(_) | Owner::Aligned(_)) => {
                // SAFETY: the owner has at least these bytes, and nobody else a way to them.
                Some(unsafe {
                    std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len)
                })
            }
            _ => None,
        }
    }

    fn parts(&self) -> &[libc::iovec] {
        match &self.parts {
            Parts::One(part) => std::slice::from_ref(part),
            Parts::Many(parts) => parts,
        }
    }

    /// Adds the part `skip..skip + len` of the bytes to a list of buffers.
    pub(super) fn slice_into(&self, skip: u64, len: u64, out: &mut Vec<libc::iovec>) {
        if skip == 0 && len == self.len {
            out.extend_from_slice(self.parts());
            return;
        }
        let (mut skip, mut len) = (to_usize(skip), to_usize(len));
        for part in self.parts() {
            let from = skip.min(part.iov_len);
            let now = (part.iov_len - from).min(len);
            skip -= from;
            len -= now;
            if now > 0 {
                let iov_base = part.iov_base.wrapping_byte_add(from);
                out.push(libc::iovec { iov_base, iov_len: now });
            }
        }
    }

    /// Fills a part of the bytes with zeroes.
    pub(super) fn fill_zero(&mut self, skip: u64, len: u64) {
        iobuf::fill_zero(&iobuf::slice_read(self.read_bufs(), skip, len));
    }

    /// The buffers as the target of a read.
    pub(crate) fn read_bufs(&mut self) -> &[ReadBuf<'_>] {
        let parts = self.parts();
        // SAFETY: ReadBuf is repr(transparent) over iovec; the memory is valid as long as `self`
        // lives, and `self` is borrowed exclusively meanwhile.
        unsafe { std::slice::from_raw_parts(parts.as_ptr().cast(), parts.len()) }
    }

    /// The buffers as the source of a write.
    pub(crate) fn write_bufs(&self) -> &[WriteBuf<'_>] {
        let parts = self.parts();
        // SAFETY: as in `read_bufs`, for memory that is only read.
        unsafe { std::slice::from_raw_parts(parts.as_ptr().cast(), parts.len()) }
    }
}

impl Debug for OwnedBufs {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedBufs")
            .field("len", &self.len)
            .field("parts", &self.parts().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_as_what_they_were_made_from() {
        let bufs = OwnedBufs::from_vec(vec![1, 2, 3]);
        assert_eq!((bufs.len(), bufs.as_slice()), (3, Some(&[1, 2, 3][..])));
        assert_eq!(bufs.into_vec().unwrap(), [1, 2, 3]);
        let mut buf = AlignedBuf::new(8192);
        buf[0] = 7;
        assert!(buf.as_ptr().addr().is_multiple_of(BUF_ALIGN));
        let bufs = OwnedBufs::aligned_part(buf, 512);
        assert_eq!((bufs.len(), bufs.as_slice().unwrap()[0]), (512, 7));
        assert_eq!(bufs.into_aligned().unwrap().len(), 8192);
        assert!(OwnedBufs::none().into_vec().is_none());
        assert!(AlignedBuf::new(0).is_empty());
    }

    #[test]
    fn raw_memory_is_kept_until_the_buffers_go() {
        let keep = std::sync::Arc::new([5u8; 64]);
        let part = iovec(keep.as_ptr().cast_mut(), 64);
        // SAFETY: the array lives as long as the Arc that is handed over, and is only read.
        let bufs = unsafe { OwnedBufs::from_raw(vec![part], keep.clone()) };
        assert_eq!(std::sync::Arc::strong_count(&keep), 2);
        assert_eq!(bufs.len(), 64);
        assert!(bufs.as_slice().is_none());
        drop(bufs);
        assert_eq!(std::sync::Arc::strong_count(&keep), 1);
    }
}
