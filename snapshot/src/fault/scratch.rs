//! Where pages are read to before they become guest RAM.

use std::io;

use block::ReadBuf;
use vm_memory::MmapRegion;

use super::uffd::Uffd;
use super::units::{BLOCK, Piece};
use crate::memory::FormerRam;
use crate::units::index;

/// Memory for a read of a block, aligned as a huge page is.
pub(super) struct Scratch {
    memory: MmapRegion<()>,
    /// Offset of the block in it.
    skip: usize,
}

impl Scratch {
    /// # Errors
    /// The host has no memory.
    pub(super) fn new() -> io::Result<Self> {
        let memory = MmapRegion::new(2 * index(BLOCK)).map_err(io::Error::other)?;
        let skip = memory.as_ptr().addr().wrapping_neg() % index(BLOCK);
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] {
            // SAFETY: the range is the mapping just made; neither advice changes its contents. These are
            // wishes: without huge pages pages are given one by one.
            unsafe { libc::madvise(memory.as_ptr().cast(), memory.size(), advice) };
        }
        Ok(Self { memory, skip })
    }

    fn start(&self) -> *mut u8 {
        self.memory.as_ptr().wrapping_add(self.skip)
    }
}

/// Memory for the bytes of a claimed piece of guest RAM.
pub(super) struct Place<'a> {
    start: *mut u8,
    len: u64,
    /// Its pages may become guest RAM themselves.
    given: bool,
    _memory: std::marker::PhantomData<&'a mut Scratch>,
}

impl<'a> Place<'a> {
    /// Where the piece was in guest RAM before, if that is known: its pages need neither be found nor
    /// cleared by the host. Else `scratch`.
    pub(super) fn of(piece: &Piece, former: &'a FormerRam, scratch: &'a mut Scratch) -> Self {
        assert!(piece.len <= BLOCK, "a piece is of one block");
        let former = former.place(piece.host, piece.len);
        // A part of a huge page would have to be cut out of it; that costs more than a copy.
        let given = former.is_some() || piece.len == BLOCK;
        let start = former.unwrap_or_else(|| scratch.start());
        Self { start, len: piece.len, given, _memory: std::marker::PhantomData }
    }

    /// The bytes, to be filled.
    pub(super) fn buf(&mut self) -> ReadBuf<'_> {
        // SAFETY: either is private memory of that many bytes, mapped as long as it is borrowed: scratch
        // memory of the thread that borrows it, or a place that only who claimed the piece asks for.
        unsafe { ReadBuf::from_raw(self.start, index(self.len)) }
    }

    /// Makes them guest RAM from host address `to` on, and wakes who waits for it.
    pub(super) fn put(self, uffd: &Uffd, to: usize) -> io::Result<()> {
        if self.given {
            // SAFETY: as for `buf`; the place is used up.
            unsafe { uffd.give(to, self.start, self.len) }
        } else {
            // SAFETY: as for `buf`.
            unsafe { uffd.copy(to, self.start, self.len) }
        }
    }
}
