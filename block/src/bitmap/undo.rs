//! Restoring bitmaps when a transaction is undone.

use std::sync::Arc;

use super::dirty::Stored;
use super::{Bitmap, BitmapSet, Bits};
use crate::{Node, Result};

/// A bitmap as it was at some moment. Requests to its node are held back until it is put back or no
/// longer needed, so that no write in between is forgotten.
#[derive(Debug)]
pub struct BitmapUndo {
    set: Arc<BitmapSet>,
    bitmap: Arc<Bitmap>,
    bits: Bits,
    enabled: bool,
}

impl Node {
    /// Remembers a bitmap.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn bitmap_undo(&self, name: &str) -> Result<BitmapUndo> {
        let set = self.bitmaps();
        let bitmap = set.get(name)?;
        let bits = bitmap.with_bits(|bits| bits.clone());
        let enabled = bitmap.enabled();
        Ok(BitmapUndo { set, bitmap, bits, enabled })
    }
}

impl BitmapUndo {
    /// Puts it back, also where it was removed. What the image has of it is out of date until it is
    /// stored again, as for any bitmap that has changed.
    pub fn restore(self) {
        let Self { set, bitmap, bits, enabled } = self;
        bitmap.with_bits(|now| *now = bits);
        bitmap.set_enabled(enabled);
        if !set.all().iter().any(|other| Arc::ptr_eq(other, &bitmap)) {
            // It was removed from the image, too.
            bitmap.set_stored(Stored::No);
            if let Err(error) = set.add(bitmap) {
                tracing::error!("a bitmap is lost: {error}");
            }
        }
    }
}
