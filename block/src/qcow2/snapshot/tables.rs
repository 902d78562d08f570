//! The tables of a snapshot, for reading what it holds without changing the active disk.

use crate::Result;
use crate::num::to_usize;
use crate::qcow2::Qcow2;
use crate::qcow2::read::{Extent, map};
use crate::snapshot::SnapshotInfo;

use super::{find, load_l1};

/// The mapping of one snapshot. While it is open the snapshot cannot be deleted, so what it maps stays
/// where it is.
pub(super) struct Tables<'a> {
    pub(super) image: &'a Qcow2,
    id: String,
    l1: Vec<u64>,
}

impl<'a> Tables<'a> {
    /// Opens the tables of snapshot `id`.
    pub(super) fn open(image: &'a Qcow2, id: &str) -> Result<(Self, SnapshotInfo)> {
        let mut meta = image.meta();
        let entry = find(&meta, id)?;
        let l1 = load_l1(&meta, &entry)?;
        meta.readers.push(id.to_owned());
        Ok((Self { image, id: id.to_owned(), l1 }, entry.info))
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
        meta.trim_clean();
        map(&mut meta, |_: &_, index| self.l1_entry(index), guest, len)
    }
}

impl Drop for Tables<'_> {
    fn drop(&mut self) {
        let mut meta = self.image.meta();
        if let Some(at) = meta.readers.iter().position(|id| *id == self.id) {
            meta.readers.swap_remove(at);
        }
    }
}
