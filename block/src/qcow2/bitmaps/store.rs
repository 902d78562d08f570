//! Writing the bitmaps when an image is closed, and taking one out.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::bitmap::{Bitmap, Stored};
use crate::qcow2::Qcow2;
use crate::qcow2::layout::Run;
use crate::qcow2::meta::Meta;
use crate::{Error, Result};

use super::directory::{Entry, flag, table_entries};
use super::{bitmaps_out_of_date, clusters_of, mark, switch, table};

impl Qcow2 {
    /// Stores the persistent bitmaps: what the image has is up to date afterwards. Nobody may write
    /// to the disk from before this call to the end of the image's use, or until
    /// [`Qcow2::resume_bitmaps`].
    ///
    /// Order: see the module. One whose contents are as the image has them only loses its mark.
    ///
    /// # Errors
    /// If the image could not be written; what is stored counts as out of date then, and it can be
    /// tried again.
    pub fn store_bitmaps(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.mark_bitmaps_left()?;
        let mut bitmaps = self.bitmaps.persistent();
        bitmaps.retain(|bitmap| bitmap.stored() != Stored::UpToDate && !bitmap.inconsistent());
        if bitmaps.is_empty() {
            return Ok(());
        }
        let mut meta = self.meta();
        if let Err(e) = meta.check_writable() {
            // Nothing is written any more, and the image can still be closed. What follows writes stays
            // marked as out of date.
            tracing::warn!(image = meta.storage.name(), "bitmaps are not stored: {e}");
            return Ok(());
        }
        let (changed, same): (Vec<_>, Vec<_>) = bitmaps
            .iter()
            .cloned()
            .partition(|bitmap| bitmap.stored() == Stored::No || bitmap.changed());
        if !changed.is_empty() {
            store_changed(&mut meta, &changed)?;
        }
        if !same.is_empty() {
            // Data that was written must not be newer than what a valid bitmap tells of.
            meta.sync()?;
            mark(&mut meta, false, |entry| {
                same.iter().any(|bitmap| entry.usable_name() == Some(bitmap.name()))
            })?;
            same.iter().for_each(|bitmap| bitmap.set_stored(Stored::UpToDate));
        }
        Ok(())
    }

    /// After [`Qcow2::store_bitmaps`], for an image that is written to again: marks the bitmaps that
    /// follow writes, durably.
    ///
    /// # Errors
    /// If the image could not be written: each change of the disk tries it again first, and is refused where
    /// it fails.
    pub(crate) fn resume_bitmaps(&self) -> Result<()> {
        let mut meta = self.meta();
        let marked = bitmaps_out_of_date(self, &mut meta, Bitmap::enabled);
        meta.unmarked = marked.as_ref().err().map(ToString::to_string);
        self.unmarked.store(marked.is_err(), Ordering::Release);
        marked
    }

    /// To be called before the disk is changed, and with nothing locked: marks the bitmaps where that has
    /// failed before.
    pub(in crate::qcow2) fn mark_bitmaps_left(&self) -> Result<()> {
        if self.unmarked.load(Ordering::Acquire) { self.resume_bitmaps() } else { Ok(()) }
    }

    /// Takes a bitmap out of the image.
    ///
    /// Order: the new directory is in force before clusters are freed; see [`switch`].
    pub(crate) fn remove_stored_bitmap(&self, bitmap: &Arc<Bitmap>) -> Result<()> {
        if bitmap.stored() == Stored::No {
            return Ok(());
        }
        self.mark_bitmaps_left()?;
        let mut meta = self.meta();
        meta.check_writable()?;
        let Some(at) = meta.bitmaps.position(bitmap.name()) else {
            return Ok(());
        };
        let mut entries = meta.bitmaps.entries.clone();
        let removed = entries.remove(at);
        let runs = clusters_of(&meta, &removed);
        let switched = switch(&mut meta, entries);
        if meta.bitmaps.position(bitmap.name()).is_none() {
            // Whatever fails from here on: where the bitmap stays, it has to be stored anew.
            bitmap.set_stored(Stored::No);
        }
        switched?;
        meta.free_after_error(&runs);
        meta.sync()
    }
}

/// Writes bitmaps whose contents changed.
fn store_changed(meta: &mut Meta, bitmaps: &[Arc<Bitmap>]) -> Result<()> {
    let mut taken = Vec::new();
    let mut entries = meta.bitmaps.entries.clone();
    let mut old = Vec::new();
    let mut stored = Vec::new();
    for bitmap in bitmaps {
        match store_one(meta, bitmap, &mut entries, &mut taken) {
            Ok(Some(runs)) => {
                old.extend(runs);
                stored.push(bitmap);
            }
            Ok(None) => {}
            Err(e) => {
                meta.free_after_error(&taken);
                return Err(e);
            }
        }
    }
    if stored.is_empty() {
        return Ok(());
    }
    // After an error the header may refer to the new directory: its clusters are leaked.
    switch(meta, entries)?;
    for bitmap in stored {
        bitmap.set_stored(Stored::UpToDate);
        bitmap.set_unchanged();
    }
    meta.free_after_error(&old);
    meta.sync()
}

/// Writes one bitmap and puts its entry in place; gives the clusters that the old entry has. `None`
/// if it cannot be stored: the entry stays as it is, marked as out of date.
fn store_one(
    meta: &mut Meta,
    bitmap: &Arc<Bitmap>,
    entries: &mut Vec<Entry>,
    taken: &mut Vec<Run>,
) -> Result<Option<Vec<Run>>> {
    let geometry = meta.geometry();
    let wanted = table_entries(bitmap.granularity(), meta.header.size, geometry);
    if wanted == 0 || geometry.bytes_of(wanted) > super::directory::MAX_DATA {
        tracing::warn!(
            image = meta.storage.name(),
            "bitmap '{}' is not stored: the format has no room for it on a disk of {} bytes",
            bitmap.name(),
            meta.header.size
        );
        return Ok(None);
    }
    let at = entries.iter().position(|entry| entry.usable_name() == Some(bitmap.name()));
    let table_offset = bitmap.with_bits(|bits| table::write(meta, bits, wanted, taken))?.0;
    let mut entry = Entry {
        table_offset,
        table_size: u32::try_from(wanted).map_err(|_| {
            Error::Invalid(format!("bitmap '{}' is too large to be stored", bitmap.name()))
        })?,
        flags: if bitmap.enabled() { flag::AUTO } else { 0 },
        granularity: bitmap.granularity(),
        name: bitmap.name().as_bytes().to_vec(),
        extra: Vec::new(),
    };
    let Some(at) = at else {
        entries.push(entry);
        return Ok(Some(Vec::new()));
    };
    // Extra data that does not matter goes along.
    entry.extra = std::mem::take(&mut entries[at].extra);
    entry.flags |= entries[at].flags & flag::EXTRA_COMPATIBLE;
    let old = std::mem::replace(&mut entries[at], entry);
    Ok(Some(clusters_of(meta, &old)))
}
