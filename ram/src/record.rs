//! What the host knows of a region beside its contents.

use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::Written;

/// The pages of a region that the host wrote, and whether files are mapped among them.
#[derive(Debug, Default)]
pub struct Record {
    written: Written,
    pieces: AtomicBool,
}

impl Record {
    /// The pages that the host wrote.
    pub fn written(&self) -> &Written {
        &self.written
    }

    /// Whether pieces of a file are mapped over the region's anonymous memory: untouched pages may hold data then,
    /// and dropped ones come back.
    pub fn has_pieces(&self) -> bool {
        self.pieces.load(Ordering::Acquire)
    }

    /// Says so: before the first one is mapped, or after the last one has gone.
    pub fn set_pieces(&self, pieces: bool) {
        self.pieces.store(pieces, Ordering::Release);
    }
}

impl<'a> WithBitmapSlice<'a> for Record {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Record {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.written.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.written.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for Record {
    fn with_len(len: usize) -> Self {
        Self { written: Written::with_len(len), pieces: AtomicBool::new(false) }
    }
}
