//! Persistent dirty bitmaps ("Bitmaps extension" of the specification).
//!
//! ```text
//! header extension ──> directory ──> bitmap table ──> data clusters
//! ```
//!
//! | file | what |
//! |---|---|
//! | `directory` | extension and directory as bytes, checked |
//! | `table` | a bitmap's table and data |
//! | `load` | reading them when the image is opened |
//! | `store` | writing them when it is closed, and removing |
//!
//! **The crash rule.** A bitmap on disk that looks valid is valid. Opened for writing, the image has
//! every bitmap that follows writes marked as in_use, durably, before anything else is written; one
//! that is disabled is marked before it changes. At close the guest's data is durable first, then new
//! tables and data in fresh clusters, then a new directory, then the header refers to it in one write
//! within one sector. A crash leaves bitmaps that say they are out of date, and leaked clusters.

mod directory;
mod load;
mod store;
mod table;

#[cfg(test)]
mod tests;

pub(super) use load::load;

use directory::{Entry, flag, flag_places};

use crate::bitmap::{Bitmap, Granularity, Stored};
use crate::num::to_u64;
use crate::{Error, Result, WriteBuf};

use super::Qcow2;
use super::header::extension;
use super::layout::{HostOffset, Run};
use super::meta::Meta;
use super::snapshot::write_fresh;

/// Autoclear feature bit 0: the bitmaps extension is consistent.
pub(super) const AUTOCLEAR: u64 = 1;

/// The directory as it is on disk.
#[derive(Debug, Default)]
pub(super) struct Directory {
    entries: Vec<Entry>,
    /// Host offset; 0 without one.
    offset: u64,
}

/// A bitmap as the image has it (`Qcow2BitmapInfo` of QMP).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Whether it may be out of date.
    pub in_use: bool,
    /// Whether it follows writes.
    pub auto: bool,
}

impl Directory {
    /// The clusters it lies in.
    pub(super) fn run(&self, meta: &Meta) -> Option<Run> {
        let geometry = meta.geometry();
        let bytes = to_u64(directory::encode(&self.entries).len());
        (self.offset != 0).then(|| Run {
            first: geometry.cluster_of(HostOffset(self.offset)),
            count: geometry.clusters(bytes),
        })
    }

    /// The autoclear bits that are true of the image: bitmaps are kept up to date if there are any.
    pub(super) fn autoclear(&self) -> u64 {
        if self.entries.is_empty() { 0 } else { AUTOCLEAR }
    }

    /// Host offset; 0 without one.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.usable_name() == Some(name))
    }

    fn infos(&self) -> Vec<StoredBitmap> {
        let info = |entry: &Entry| StoredBitmap {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            granularity: entry.granularity.bytes(),
            in_use: entry.in_use(),
            auto: entry.flags & flag::AUTO != 0,
        };
        self.entries.iter().map(info).collect()
    }
}

/// Sets or clears the in_use flag of the entries chosen, durably; others keep theirs. All in place:
/// each flag lies in one sector, so a crash leaves each as it was or as it shall be. Before that the
/// header surely refers to the directory whose flags these are: see [`switch`].
fn mark(meta: &mut Meta, in_use: bool, chosen: impl Fn(&Entry) -> bool) -> Result<()> {
    meta.settle_header()?;
    let new: Vec<u32> = meta
        .bitmaps
        .entries
        .iter()
        .map(|entry| match chosen(entry) {
            true if in_use => entry.flags | flag::IN_USE,
            true => entry.flags & !flag::IN_USE,
            false => entry.flags,
        })
        .collect();
    let places: Vec<u64> = flag_places(&meta.bitmaps.entries).collect();
    let mut changed = false;
    for ((entry, flags), at) in meta.bitmaps.entries.iter().zip(&new).zip(places) {
        if entry.flags != *flags {
            changed = true;
            let at = meta.bitmaps.offset + at;
            meta.storage.write_at(at, &[WriteBuf::new(&flags.to_be_bytes())])?;
        }
    }
    if changed {
        meta.storage.flush()?;
        for (entry, flags) in meta.bitmaps.entries.iter_mut().zip(new) {
            entry.flags = flags;
        }
    }
    Ok(())
}

impl Qcow2 {
    /// The bitmaps that the image has stored, as they are on disk.
    pub(crate) fn stored_bitmaps(&self) -> Vec<StoredBitmap> {
        self.meta().bitmaps.infos()
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the image could store one more bitmap, over its disk as it is now.
    ///
    /// # Errors
    /// With QEMU's text.
    pub(crate) fn check_new_bitmap(&self, name: &str, granularity: Granularity) -> Result<()> {
        let refuse = |why: String| Err(Error::Invalid(why));
        let meta = self.meta();
        let geometry = meta.geometry();
        if geometry.version < 3 {
            return refuse("Cannot store dirty bitmaps in qcow2 v2 files".to_owned());
        }
        meta.check_writable()?;
        if name.len() > directory::MAX_NAME {
            let most = directory::MAX_NAME;
            return refuse(format!("Name length exceeds maximum ({most} characters)"));
        }
        let entries = directory::table_entries(granularity, self.disk_size(), geometry);
        if entries == 0 {
            let why = "no bitmap of a disk of 0 bytes can be stored: give the disk a size first";
            return refuse(why.to_owned());
        }
        if geometry.bytes_of(entries) > directory::MAX_DATA {
            let why = "Too much space will be occupied by the bitmap. Use larger granularity";
            return refuse(why.to_owned());
        }
        let stored: Vec<Entry> = meta.bitmaps.entries.clone();
        let waiting: Vec<_> = self.bitmaps.persistent();
        let waiting = waiting.iter().filter(|bitmap| bitmap.stored() == Stored::No);
        let waiting: Vec<&str> = waiting.map(|bitmap| bitmap.name()).collect();
        if stored.len() + waiting.len() >= directory::MAX_BITMAPS {
            return refuse("Maximum number of persistent bitmaps is already reached".to_owned());
        }
        let more: u64 = waiting.iter().map(|name| directory::size_with(&[], name)).sum();
        if directory::size_with(&stored, name) + more > directory::MAX_DIRECTORY {
            return refuse("Not enough space in the bitmap directory".to_owned());
        }
        Ok(())
    }

    /// Marks stored bitmaps as out of date, durably: to be done before they change in memory.
    pub(crate) fn bitmaps_out_of_date(&self, chosen: impl Fn(&Bitmap) -> bool) -> Result<()> {
        bitmaps_out_of_date(self, &mut self.meta(), chosen)
    }

    /// To be called before the disk gets another size, or other contents than by writes through the
    /// node: checks that the bitmaps can follow, and marks what is stored, durably. `meta` is the
    /// image's own, locked.
    ///
    /// # Errors
    /// A bitmap is in use or would be too large, or the image could not be written.
    pub(super) fn bitmaps_before_resize(&self, meta: &mut Meta, size: u64) -> Result<()> {
        if size != self.disk_size() {
            self.bitmaps.check_resize(size)?;
            bitmaps_out_of_date(self, meta, |_| true)?;
        }
        Ok(())
    }

    /// After [`Qcow2::bitmaps_before_resize`], once the disk has its new size.
    pub(super) fn bitmaps_after_resize(&self, size: u64) {
        self.bitmaps.resize(size);
    }

    /// After the disk became what a snapshot has: of `size` bytes, each of which may be another.
    pub(super) fn bitmaps_after_revert(&self, size: u64) {
        self.bitmaps.resize(size);
        self.bitmaps.note(0, size);
    }
}

fn bitmaps_out_of_date(
    image: &Qcow2,
    meta: &mut Meta,
    chosen: impl Fn(&Bitmap) -> bool,
) -> Result<()> {
    let mut bitmaps = image.bitmaps.persistent();
    bitmaps.retain(|bitmap| bitmap.stored() == Stored::UpToDate && chosen(bitmap));
    if bitmaps.is_empty() {
        // Those that are marked are so in the directory that memory has, not in one that failed.
        return meta.settle_header();
    }
    mark(meta, true, |entry| {
        bitmaps.iter().any(|bitmap| entry.usable_name() == Some(bitmap.name()))
    })?;
    bitmaps.iter().for_each(|bitmap| bitmap.set_stored(Stored::OutOfDate));
    Ok(())
}

/// Makes `entries` the directory of the image, on disk and in memory.
///
/// Order: the directory goes to fresh clusters and is durable with all that it refers to and with its
/// counts; then the header refers to it, within one sector; then the old directory is freed. After
/// an error the header may have either, and the clusters of both are kept. The new one says that its
/// bitmaps are valid, so nothing that a bitmap follows may change before the header surely has the old
/// one again: whoever marks bitmaps writes it first ([`Meta::settle_header`]), and writes are
/// refused until that succeeds.
fn switch(meta: &mut Meta, entries: Vec<Entry>) -> Result<()> {
    let old = meta.bitmaps.run(meta);
    let bytes = directory::encode(&entries);
    let size = to_u64(bytes.len());
    let new = match entries.is_empty() {
        true => None,
        false => Some(write_fresh(meta, bytes)?),
    };
    if let Err(e) = meta.sync() {
        meta.free_after_error(new.as_slice());
        return Err(e);
    }
    let offset = new.map_or(0, |run| meta.geometry().offset_of(run.first).0);
    let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    let data = new.map(|_| directory::Extension { count, size, offset }.encode());
    meta.update_header(|header| {
        header.autoclear = match data {
            Some(_) => header.autoclear | AUTOCLEAR,
            None => header.autoclear & !AUTOCLEAR,
        };
        header.set_extension(extension::BITMAPS, data);
    })?;
    meta.bitmaps = Directory { entries, offset };
    meta.places.bitmap_directory = new;
    match old {
        Some(run) => meta.free(run),
        None => Ok(()),
    }
}

/// The clusters of an entry; none, with a warning, if its table cannot be trusted: they are leaked.
fn clusters_of(meta: &Meta, entry: &Entry) -> Vec<Run> {
    let geometry = meta.geometry();
    let parts = table::read(&*meta.storage, entry).map_err(|e| e.to_string()).and_then(|bytes| {
        let len = meta.storage.len().map_err(|e| e.to_string())?;
        table::decode(&bytes, geometry, len)
    });
    match parts {
        Ok(parts) => table::runs(entry, &parts, geometry),
        Err(why) => {
            let name = String::from_utf8_lossy(&entry.name);
            tracing::warn!(
                image = meta.storage.name(),
                "clusters of bitmap '{name}' are leaked: {why}"
            );
            Vec::new()
        }
    }
}
