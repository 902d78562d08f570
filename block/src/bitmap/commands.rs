//! The bitmap commands of QMP and of `tardigrade image bitmap`, with QEMU's texts.
//!
//! **Order.** Whatever changes a bitmap that the image has stored first marks the stored one as out
//! of date, durably ([`Qcow2::bitmaps_out_of_date`]); only then memory changes. A crash in between
//! leaves a bitmap that says it cannot be trusted, never one that lacks a change.
//!
//! [`Qcow2::bitmaps_out_of_date`]: crate::qcow2::Qcow2::bitmaps_out_of_date

use std::sync::Arc;

use crate::{Error, Node, Result};

use super::{Bitmap, BitmapSet, Granularity, Start};

/// The arguments of block-dirty-bitmap-add.
#[derive(Debug, Clone, Copy, Default)]
pub struct NewBitmap<'a> {
    /// Its name, unique on the node.
    pub name: &'a str,
    /// Bytes that one bit stands for; [`Granularity::default_for`] without it.
    pub granularity: Option<u64>,
    /// Whether it is stored in the image when that is closed.
    pub persistent: bool,
    /// Whether it starts without noting writes.
    pub disabled: bool,
}

impl Node {
    /// The bitmaps of the node.
    pub fn bitmaps(&self) -> Arc<BitmapSet> {
        self.details().bitmaps.clone()
    }

    /// block-dirty-bitmap-add.
    ///
    /// # Errors
    /// The name or the granularity is bad, or the image cannot store it.
    pub fn add_bitmap(&self, new: &NewBitmap<'_>) -> Result<()> {
        let details = self.details();
        let cluster_size = details.qcow2.as_ref().map(|image| image.info().cluster_size);
        let granularity = match new.granularity {
            Some(bytes) => Granularity::new(bytes)?,
            None => Granularity::default_for(cluster_size),
        };
        if details.bitmaps.get(new.name).is_ok() {
            return Err(Error::Invalid(format!("Bitmap already exists: {}", new.name)));
        }
        if new.persistent && !new.name.is_empty() {
            let Some(image) = &details.qcow2 else {
                return Err(Error::Invalid(format!(
                    "Can't store persistent bitmaps to {}: Operation not supported",
                    self.name()
                )));
            };
            image.check_new_bitmap(new.name, granularity).map_err(|e| {
                Error::Invalid(format!(
                    "Can't make bitmap '{}' persistent in '{}': {e}",
                    new.name,
                    self.name()
                ))
            })?;
        }
        let start = Start::new(!new.disabled, new.persistent);
        let bitmap = Bitmap::new(new.name, granularity, self.size(), start)?;
        details.bitmaps.add(Arc::new(bitmap))
    }

    /// block-dirty-bitmap-remove: from the image too, if it is stored there.
    ///
    /// # Errors
    /// There is none, it is in use, or the image could not be changed; it stays then.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        let details = self.details();
        let bitmap = details.bitmaps.get(name)?;
        bitmap.check_removable()?;
        if bitmap.persistent()
            && let Some(image) = &details.qcow2
        {
            image.remove_stored_bitmap(&bitmap)?;
        }
        details.bitmaps.remove(&bitmap);
        Ok(())
    }

    /// block-dirty-bitmap-clear.
    ///
    /// # Errors
    /// There is none, it is in use or inconsistent, or the image could not be marked.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        let bitmap = self.bitmaps().get(name)?;
        bitmap.check_changeable()?;
        self.bitmap_changes(&bitmap)?;
        bitmap.clear();
        Ok(())
    }

    /// block-dirty-bitmap-enable and block-dirty-bitmap-disable.
    ///
    /// # Errors
    /// As [`Node::clear_bitmap`].
    pub fn enable_bitmap(&self, name: &str, enabled: bool) -> Result<()> {
        let bitmap = self.bitmaps().get(name)?;
        bitmap.check_usable()?;
        if bitmap.enabled() != enabled {
            self.bitmap_changes(&bitmap)?;
            bitmap.set_enabled(enabled);
        }
        Ok(())
    }

    /// block-dirty-bitmap-merge: what is dirty in any of `sources` is dirty in `target` afterwards.
    /// All or nothing. The sources' nodes must not be quiesced: writes go on.
    ///
    /// # Errors
    /// A bitmap is missing, in use or inconsistent, or the disks differ in size.
    pub fn merge_bitmaps(&self, target: &str, sources: &[Arc<Bitmap>]) -> Result<()> {
        let target = self.bitmaps().get(target)?;
        target.check_changeable()?;
        for source in sources {
            source.check_usable()?;
            target.check_same_size(source)?;
        }
        self.bitmap_changes(&target)?;
        for source in sources.iter().filter(|source| !Arc::ptr_eq(source, &target)) {
            target.merge(source)?;
        }
        Ok(())
    }

    /// Marks what the image has of a bitmap as out of date.
    pub(crate) fn bitmap_changes(&self, bitmap: &Arc<Bitmap>) -> Result<()> {
        match &self.details().qcow2 {
            Some(image) if bitmap.persistent() && !image.is_read_only() => {
                image.bitmaps_out_of_date(|other| std::ptr::eq(other, &**bitmap))
            }
            _ => Ok(()),
        }
    }
}
