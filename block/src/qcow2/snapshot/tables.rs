//! The tables of a snapshot, for reading what it holds without changing the active disk.

use crate::Result;
use crate::num::to_usize;
use crate::qcow2::Qcow2;
use crate::qcow2::meta::Meta;
use crate::qcow2::read::{Extent, map};
use crate::snapshot::SnapshotInfo;

use super::sizes::check_still_there;
use super::table::Entry;
use super::{find, load_l1};

/// The mapping of one snapshot. While it is open the snapshot cannot be deleted, so what it maps stays
/// where it is; unless it is only looked at.
pub(super) struct Tables<'a> {
    pub(super) image: &'a Qcow2,
    entry: Entry,
    /// It may be deleted meanwhile.
    looked_at: bool,
    l1: Vec<u64>,
}

impl<'a> Tables<'a> {
    /// Opens the tables of snapshot `id`.
    pub(super) fn open(image: &'a Qcow2, id: &str) -> Result<(Self, SnapshotInfo)> {
        let mut meta = image.meta();
        let (mut tables, info) = Self::of(image, &meta, id)?;
        meta.readers.push(id.to_owned());
        tables.looked_at = false;
        Ok((tables, info))
    }

    /// Opens them without keeping the snapshot from being deleted: mapping fails then, and what was
    /// read counts only if [`Tables::check_there`] says so afterwards.
    pub(super) fn look_at(image: &'a Qcow2, id: &str) -> Result<(Self, SnapshotInfo)> {
        Self::of(image, &image.meta(), id)
    }

    fn of(image: &'a Qcow2, meta: &Meta, id: &str) -> Result<(Self, SnapshotInfo)> {
        let entry = find(meta, id)?;
        let l1 = load_l1(meta, &entry)?;
        let info = entry.info.clone();
        Ok((Self { image, entry, looked_at: true, l1 }, info))
    }

    /// Whether the snapshot is still there.
    pub(super) fn check_there(&self) -> Result<()> {
        if self.looked_at { check_still_there(&self.image.meta(), &self.entry) } else { Ok(()) }
    }

    /// Entries of the L1 table.
    pub(super) fn l1_len(&self) -> u64 {
        u64::try_from(self.l1.len()).unwrap_or(0)
    }

    /// The L1 entry of an index; 0 for one that is not there.
    pub(super) fn l1_entry(&self, index: u64) -> u64 {
        self.l1.get(to_usize(index)).copied().unwrap_or(0)
    }

    /// Maps a range of guest offsets.
    pub(super) fn map(&self, guest: u64, len: u64) -> Result<Vec<Extent>> {
        let mut meta = self.image.meta();
        if self.looked_at {
            check_still_there(&meta, &self.entry)?;
        }
        meta.trim_clean();
        map(&mut meta, |_: &_, index| self.l1_entry(index), guest, len)
    }
}

impl Drop for Tables<'_> {
    fn drop(&mut self) {
        if self.looked_at {
            return;
        }
        let mut meta = self.image.meta();
        if let Some(at) = meta.readers.iter().position(|id| *id == self.entry.info.id) {
            meta.readers.swap_remove(at);
        }
    }
}
