//! Buffers that a unit is read into before it becomes guest RAM.

use block::ReadBuf;

use super::units::UNIT;
use crate::units::{PAGE, index};

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; index(PAGE)]);

/// Memory for a read of whole pages, aligned for the host's disks.
pub(super) struct Scratch(Vec<Page>);

impl Scratch {
    /// Room for so many units, filled with zeroes.
    pub(super) fn new(units: usize) -> Self {
        Self(vec![Page([0; index(PAGE)]); units * index(UNIT / PAGE)])
    }

    /// The first `len` bytes, to be filled.
    ///
    /// Panics if there are not as many, which would be an error of this crate.
    pub(super) fn buf(&mut self, len: u64) -> ReadBuf<'_> {
        assert!(index(len) <= size_of_val(self.0.as_slice()));
        // SAFETY: the pages are that many bytes without padding, borrowed as long as the buffer.
        unsafe { ReadBuf::from_raw(self.0.as_mut_ptr().cast(), index(len)) }
    }

    /// The first byte.
    pub(super) fn start(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}
