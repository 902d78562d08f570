//! The active L1 table and the L2 tables.

use std::ops::Range;

use crate::num::{to_u64, to_usize};
use crate::qcow2::cache::Table;
use crate::qcow2::layout::{COPIED, Geometry, HostCluster, HostOffset, Run, table_of};
use crate::qcow2::overlap::OverlapCheck;
use crate::qcow2::subcluster::Cluster;
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result, WriteBuf};

use super::Meta;

impl Meta {
    /// The L2 table an L1 entry refers to; `None` if there is none.
    pub(crate) fn l2_at(&mut self, l1_entry: u64) -> Result<Option<&mut Table>> {
        let Some(offset) = table_of(l1_entry) else {
            return Ok(None);
        };
        if self.geometry().in_cluster(offset.0) != 0 {
            return Err(self.damaged(format!("L1 entry {l1_entry:#x} is not a cluster offset")));
        }
        Ok(Some(self.l2.load(&*self.storage, offset)?))
    }

    /// A copy of the L2 table that an L1 entry refers to, for walks over all tables: these leave the
    /// cache as it is. Gives the table's place, or `None` if there is none.
    pub(crate) fn copy_l2(
        &mut self,
        l1_entry: u64,
        to: &mut Vec<u8>,
    ) -> Result<Option<HostOffset>> {
        let Some(offset) = table_of(l1_entry) else {
            return Ok(None);
        };
        if self.geometry().in_cluster(offset.0) != 0 {
            return Err(self.damaged(format!("L1 entry {l1_entry:#x} is not a cluster offset")));
        }
        to.resize(to_usize(self.geometry().cluster_size()), 0);
        match self.l2.peek(offset) {
            Some(table) => to.copy_from_slice(table.bytes()),
            None => self.storage.read_at(offset.0, &[ReadBuf::new(to)])?,
        }
        Ok(Some(offset))
    }

    /// Puts bytes of a snapshot's L2 table back after [`Meta::copy_l2`]: in the cache if it is there,
    /// else on disk at once. The caller sees to it that the disk may have them.
    pub(crate) fn put_l2(
        &mut self,
        offset: HostOffset,
        bytes: &[u8],
        changed: Range<usize>,
    ) -> Result<()> {
        let run = self.cluster_run(offset);
        self.check_overlap_but(run, OverlapCheck::ACTIVE_L2 | OverlapCheck::INACTIVE_L2)?;
        if let Some(table) = self.l2.peek(offset) {
            table.bytes_mut(changed.clone()).copy_from_slice(&bytes[changed]);
            return Ok(());
        }
        let at = offset + to_u64(changed.start);
        self.storage.write_at(at.0, &[WriteBuf::new(&bytes[changed])])
    }

    /// The L2 table of an L1 index, for changes: made if there is none, copied if it is shared.
    pub(crate) fn l2_for_write(&mut self, l1_index: u64) -> Result<&mut Table> {
        self.pay(l1_index);
        let at = to_usize(l1_index);
        let entry = self.l1.get(at).copied().unwrap_or(0);
        let old = table_of(entry);
        let found = self.l2_at(entry).map(|_| ());
        self.noted(found)?;
        if entry & COPIED != 0
            && let Some(offset) = old
        {
            let run = self.cluster_run(offset);
            self.check_overlap_but(run, OverlapCheck::ACTIVE_L2 | OverlapCheck::INACTIVE_L2)?;
            return self.l2.load(&*self.storage, offset);
        }
        let mut bytes = match self.l2_at(entry)? {
            Some(table) => table.bytes().to_vec(),
            None => vec![0; to_usize(self.geometry().cluster_size())],
        };
        // The old table goes on referring to the same clusters: none is ours alone.
        for entry in bytes.chunks_exact_mut(8 * self.geometry().entry_words()) {
            entry[0] &= 0x7f;
        }
        let run = self.allocate(1, true)?;
        let new = self.geometry().offset_of(run.first);
        if let Some(old) = old {
            self.defer_free(self.cluster_run(old));
        }
        self.set_l1(at, new.0 | COPIED);
        Ok(self.l2.insert(new, bytes))
    }

    /// The one cluster at a host offset.
    pub(crate) fn cluster_run(&self, host: HostOffset) -> Run {
        Run::one(self.geometry().cluster_of(host))
    }

    /// Changes an entry of the active L1 table.
    pub(crate) fn set_l1(&mut self, index: usize, entry: u64) {
        if let Some(table) = table_of(entry) {
            self.places.l2.insert(self.geometry().cluster_of(table));
        }
        if let Some(slot) = self.l1.get_mut(index) {
            *slot = entry;
            self.l1_dirty = Some(match self.l1_dirty.take() {
                Some(old) => old.start.min(index)..old.end.max(index + 1),
                None => index..index + 1,
            });
        }
    }

    /// Replaces the active L1 table by one that is on disk already.
    pub(crate) fn replace_l1(&mut self, l1: Vec<u64>, offset: u64, size: u32) {
        for table in l1.iter().copied().filter_map(table_of) {
            self.places.l2.insert(self.geometry().cluster_of(table));
        }
        self.l1 = l1;
        self.l1_dirty = None;
        self.header.l1_offset = offset;
        self.header.l1_size = size;
    }

    /// Decodes the L2 entry of a guest offset below the L1 entry given.
    pub(crate) fn cluster_below(&mut self, l1_entry: u64, guest: u64) -> Result<Cluster> {
        let geometry = self.geometry();
        let index = geometry.l2_index(guest);
        let (entry, bitmap) = match self.l2_at(l1_entry)? {
            Some(table) => (table.entry(index), table.bitmap(index)),
            None => (0, 0),
        };
        Cluster::decode(entry, bitmap, guest, geometry).map_err(|reason| {
            self.damaged(format!("L2 entry {entry:#x} of guest offset {guest:#x}: {reason}"))
        })
    }

    /// How the active disk maps the cluster of a guest offset. None is the disk's alone below a table
    /// that a snapshot has not got its references to yet.
    pub(crate) fn cluster(&mut self, guest: u64) -> Result<Cluster> {
        let index = self.geometry().l1_index(guest);
        let cluster = self.cluster_below(self.active_l1(index), guest);
        let cluster = self.noted(cluster)?;
        Ok(if self.owes(index) { cluster.shared() } else { cluster })
    }

    /// Puts a new table, to which nothing on disk refers, into the cache.
    pub(crate) fn put_new_l2(&mut self, place: HostOffset, bytes: Vec<u8>) {
        self.l2.insert(place, bytes);
    }

    /// Whether an L2 table is in memory.
    pub(crate) fn has_l2(&self, place: HostOffset) -> bool {
        self.l2.contains(place)
    }

    /// Whether an L2 table differs from what is on disk in its place.
    pub(crate) fn is_l2_dirty(&self, place: HostOffset) -> bool {
        self.l2.is_table_dirty(place)
    }

    /// The entry of the active L1 table.
    pub(crate) fn active_l1(&self, index: u64) -> u64 {
        self.l1.get(to_usize(index)).copied().unwrap_or(0)
    }

    /// Whether all L2 tables of a range of the active disk are in memory (or not there at all).
    pub(crate) fn tables_are_here(&self, guest: u64, len: u64) -> bool {
        let geometry = self.geometry();
        let last = guest + len.saturating_sub(1);
        (geometry.l1_index(guest)..=geometry.l1_index(last)).all(|index| {
            table_of(self.active_l1(index)).is_none_or(|offset| self.l2.contains(offset))
        })
    }
}

/// Refuses an L1 table that refers to an L2 table past the end of the file, where a truncated image
/// would read as zeroes, or to one twice: walks over all would take as long as such a table claims.
pub(in crate::qcow2) fn check_l1(
    storage: &dyn Storage,
    geometry: Geometry,
    what: &str,
    l1: &[u64],
) -> Result<()> {
    let corrupt =
        |reason: String| Err(Error::Corrupt { filename: storage.name().to_owned(), reason });
    let len = storage.len()?;
    let mut tables: Vec<HostOffset> = l1.iter().copied().filter_map(table_of).collect();
    tables.sort_unstable();
    if let Some(last) = tables.last().filter(|last| last.0 >= len) {
        return corrupt(format!(
            "{what} refers to an L2 table at {last:#x}, beyond the end of the file ({len} bytes); is the file truncated?"
        ));
    }
    let clusters: Vec<HostCluster> = tables.iter().map(|at| geometry.cluster_of(*at)).collect();
    match clusters.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            corrupt(format!("{what} refers to the L2 table in cluster {:#x} twice", pair[1]))
        }
        None => Ok(()),
    }
}

/// Reads an L1 table whose size has been checked.
pub(in crate::qcow2) fn read_l1(storage: &dyn Storage, offset: u64, size: u32) -> Result<Vec<u64>> {
    let mut bytes = vec![0; to_usize(size.into()) * 8];
    storage.read_at(offset, &[ReadBuf::new(&mut bytes)])?;
    Ok(bytes.chunks_exact(8).map(|entry| crate::num::be64(entry, 0)).collect())
}
