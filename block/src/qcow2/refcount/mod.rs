//! Who owns which host cluster: refcounts and allocation. `runs` changes many at once, `grow` makes blocks
//! and larger tables.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use crate::num::{be_bytes, to_u64, to_usize};
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result, WriteBuf};

use super::cache::{Table, TableCache};
use super::counts::{self, get};
use super::header::Header;
use super::layout::{Geometry, HostCluster, HostOffset, MAX_HOST, OFFSET_MASK, Run};
use super::overlap::{ClusterSet, OverlapCheck};

mod grow;
mod moved;
mod runs;

/// Refcount blocks without a count that are looked through for the end of the image.
const MAX_EMPTY_BLOCKS: u32 = 65536;

/// Tells which kind of metadata, if any, a run has.
type Holds<'a> = &'a dyn Fn(Run) -> Option<OverlapCheck>;

/// The refcount table and its blocks. Changes stay in memory until [`Refcounts::write_back`].
#[derive(Debug)]
pub(super) struct Refcounts {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    /// Entries in host order; 0 for a block that is not there, whose clusters are all free.
    table: Vec<u64>,
    table_run: Run,
    table_dirty: Option<Range<usize>>,
    /// Where the table goes, as a whole, at the next switch ([`Refcounts::adopt`]).
    next: Option<Run>,
    /// Blocks that are elsewhere than the table on disk says, until the next switch.
    moved: BTreeSet<usize>,
    blocks: TableCache,
    /// Where the blocks are.
    block_set: ClusterSet,
    /// No cluster below is free.
    hint: HostCluster,
}

/// Sets the refcount at `index` of a block.
fn set(table: &mut Table, index: usize, order: u32, value: u64) {
    let bytes = counts::bytes_of(&(index..index + 1), order);
    let at = (bytes.start * 8) >> order;
    counts::set(table.bytes_mut(bytes), index - at, order, value);
}

impl Refcounts {
    /// Reads the refcount table, as far as the file has it: a header may claim more, which would read
    /// as zeroes.
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        header: &Header,
        cache_bytes: u64,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let claimed = u64::from(header.refcount_table_clusters) << geometry.cluster_bits;
        let there = storage.len()?.saturating_sub(header.refcount_table_offset);
        let len = there.min(claimed).next_multiple_of(geometry.cluster_size());
        let mut bytes = vec![0; to_usize(len)];
        storage.read_at(header.refcount_table_offset, &[ReadBuf::new(&mut bytes)])?;
        let table: Vec<u64> =
            bytes.chunks_exact(8).map(|entry| crate::num::be64(entry, 0)).collect();
        let mut block_set = ClusterSet::default();
        for entry in table.iter().filter(|entry| **entry != 0) {
            block_set.insert(geometry.cluster_of(HostOffset(entry & OFFSET_MASK)));
        }
        Ok(Self {
            storage: storage.clone(),
            geometry,
            table,
            table_run: Run {
                first: geometry.cluster_of(HostOffset(header.refcount_table_offset)),
                count: header.refcount_table_clusters.into(),
            },
            table_dirty: None,
            next: None,
            moved: BTreeSet::new(),
            blocks: TableCache::new(geometry.cluster_size(), cache_bytes),
            block_set,
            hint: HostCluster(1),
        })
    }

    /// The clusters of the refcount table.
    pub(crate) fn table_run(&self) -> Run {
        self.table_run
    }

    /// The clusters of the blocks.
    pub(crate) fn block_runs(&self) -> Vec<Run> {
        let entries = self.table.iter().map(|entry| HostOffset(entry & OFFSET_MASK));
        entries.filter(|at| at.0 != 0).map(|at| Run::one(self.geometry.cluster_of(at))).collect()
    }

    /// Whether a cluster of a run holds a block.
    pub(crate) fn has_block_in(&self, run: Run) -> bool {
        self.block_set.first_in(run).is_some()
    }

    fn corrupt(&self, reason: String) -> Error {
        Error::Corrupt { filename: self.storage.name().to_owned(), reason }
    }

    /// Refuses what cannot be written with: a table that goes on past the end of the file, where data would be
    /// written over it; blocks past the end, or a block twice: the search for free clusters would take as
    /// long as such a table claims, and what is counted there could not be right.
    pub(crate) fn check_blocks(&self) -> Result<()> {
        let len = self.storage.len()?;
        let beyond = |what: String| {
            self.corrupt(format!(
                "{what}, beyond the end of the file ({len} bytes); is the file truncated?"
            ))
        };
        if self.geometry.clusters(to_u64(self.table.len()) * 8) < self.table_run.count {
            return Err(beyond(format!(
                "the refcount table at {:#x} has {} clusters",
                self.geometry.offset_of(self.table_run.first),
                self.table_run.count
            )));
        }
        let mut blocks: Vec<u64> = self.table.iter().copied().filter(|e| *e != 0).collect();
        blocks.sort_unstable();
        if let Some(last) = blocks.last().filter(|last| **last >= len) {
            return Err(beyond(format!("the refcount table refers to a block at {last:#x}")));
        }
        match blocks.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(self.corrupt(format!(
                "two refcount table entries refer to the block at {:#x}",
                pair[0]
            ))),
            None => Ok(()),
        }
    }

    /// The block of a cluster and the index in it; `None` if there is no block.
    fn block(&mut self, cluster: HostCluster) -> Result<Option<(&mut Table, usize)>> {
        let entries = self.geometry.block_entries();
        let Some(entry) = self.table.get(to_usize(cluster.0 / entries)).copied() else {
            return Ok(None);
        };
        if entry == 0 {
            return Ok(None);
        }
        let offset = entry & OFFSET_MASK;
        if offset != entry || self.geometry.in_cluster(offset) != 0 {
            return Err(self.corrupt(format!(
                "refcount table entry {} is {entry:#x}, not a cluster offset",
                cluster.0 / entries
            )));
        }
        let table = self.blocks.load(&*self.storage, HostOffset(offset))?;
        Ok(Some((table, to_usize(cluster.0 % entries))))
    }

    /// How many references a cluster has.
    pub(crate) fn get(&mut self, cluster: HostCluster) -> Result<u64> {
        let order = self.geometry.refcount_order;
        Ok(match self.block(cluster)? {
            Some((table, index)) => get(table.bytes(), index, order),
            None => 0,
        })
    }

    fn set(&mut self, cluster: HostCluster, value: u64) -> Result<()> {
        let order = self.geometry.refcount_order;
        match self.block(cluster)? {
            Some((table, index)) => set(table, index, order, value),
            None => {
                return Err(self.corrupt(format!("cluster {cluster:#x} has no refcount block")));
            }
        }
        Ok(())
    }

    /// Takes `want` free clusters in a row, or fewer (at least one) unless `exact`. `holds` knows
    /// which hold metadata: counts that call such a cluster free are wrong.
    pub(crate) fn allocate(&mut self, want: u64, exact: bool, holds: Holds<'_>) -> Result<Run> {
        let mut at = self.next_free(self.hint)?;
        // So that the next search begins here, also if this place is too small for the run.
        self.hint = at;
        loop {
            at = self.next_free(at)?;
            let mut count = 1;
            while count < want && self.get(at + count)? == 0 {
                count += 1;
            }
            if exact && count < want {
                at = at + count;
                continue;
            }
            let run = Run { first: at, count };
            if self.geometry.offset_of(run.end()).0 >= MAX_HOST {
                return Err(Error::NotSupported(format!(
                    "Image '{}' cannot grow any more",
                    self.storage.name()
                )));
            }
            self.check_free(run, holds)?;
            // New blocks are placed in the ranges they describe, perhaps in this very run.
            if let Some(next) = self.ensure_blocks(run, exact, holds)? {
                at = next;
                continue;
            }
            for cluster in run.clusters() {
                self.set(cluster, 1)?;
            }
            // A search for several in a row may have passed free ones.
            if !exact || want == 1 || run.first == self.hint {
                self.hint = run.end();
            }
            return Ok(run);
        }
    }

    /// Whether so many clusters can be taken with what is in memory: no block has to be read or made.
    pub(crate) fn has_room_here(&mut self, clusters: u64) -> bool {
        let order = self.geometry.refcount_order;
        let entries = self.geometry.block_entries();
        let at = to_usize(self.hint.0 / entries);
        let offset = match self.table.get(at) {
            Some(entry) if *entry != 0 => HostOffset(*entry & OFFSET_MASK),
            _ => return false,
        };
        if !self.blocks.contains(offset) {
            return false;
        }
        let Ok(table) = self.blocks.load(&*self.storage, offset) else {
            return false;
        };
        let (bytes, from) = (table.bytes(), to_usize(self.hint.0 % entries));
        let free = (from..to_usize(entries)).filter(|i| get(bytes, *i, order) == 0);
        to_u64(free.take(to_usize(clusters)).count()) == clusters
    }

    /// The first cluster from `at` on that nobody refers to.
    fn next_free(&mut self, mut at: HostCluster) -> Result<HostCluster> {
        let order = self.geometry.refcount_order;
        let entries = to_usize(self.geometry.block_entries());
        while let Some((table, index)) = self.block(at)? {
            let bytes = table.bytes();
            match (index..entries).find(|i| get(bytes, *i, order) == 0) {
                Some(free) => return Ok(at + to_u64(free - index)),
                None => at = at + to_u64(entries - index),
            }
            // The first search in a large image that is full looks at all there are.
            if self.blocks.is_over() {
                self.blocks.shrink();
            }
        }
        Ok(at)
    }

    /// Refuses clusters that count as free but hold something.
    fn check_free(&self, run: Run, holds: Holds<'_>) -> Result<()> {
        let block = self.has_block_in(run).then_some(OverlapCheck::REFCOUNT_BLOCK);
        match holds(run).or(block) {
            Some(kind) => Err(self.corrupt(kind.prevented())),
            None => Ok(()),
        }
    }

    /// Drops blocks from memory that were not used since the last call.
    pub(crate) fn drop_unused(&mut self) {
        self.blocks.drop_unused();
    }

    /// Whether anything differs from the disk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.next.is_some() || self.table_dirty.is_some() || self.blocks.is_dirty()
    }

    /// Whether [`Refcounts::write_blocks`] has something to write.
    pub(crate) fn has_dirty_blocks(&self) -> bool {
        self.blocks.is_dirty()
    }

    /// Writes blocks, then table entries; a flush comes in between where entries are new, so that
    /// the table never refers to a block that is not there. Not while the table moves.
    pub(crate) fn write_back(&mut self) -> Result<()> {
        self.blocks.write_back(&*self.storage)?;
        if let Some(range) = self.table_dirty.clone() {
            self.storage.flush()?;
            let bytes = be_bytes(&self.table[range.clone()]);
            let at = self.geometry.offset_of(self.table_run.first) + to_u64(range.start) * 8;
            self.storage.write_at(at.0, &[WriteBuf::new(&bytes)])?;
            self.table_dirty = None;
        }
        if self.blocks.is_over() {
            self.blocks.shrink();
        }
        Ok(())
    }

    /// Keeps the cache within its limit. Blocks may be written at any time: they hold references
    /// that are needed already, and lack only such as nothing on disk uses. New ones, and those that
    /// moved, are in places that nothing on disk refers to.
    pub(crate) fn trim(&mut self) -> Result<()> {
        if self.blocks.is_over() {
            self.write_blocks()?;
            self.blocks.shrink();
        }
        Ok(())
    }

    /// Writes blocks ahead of a sync, which may be done at any time: see [`Refcounts::trim`].
    pub(crate) fn write_blocks(&mut self) -> Result<()> {
        self.blocks.write_back(&*self.storage)
    }

    /// Whether [`Refcounts::trim`] has something to do.
    pub(crate) fn needs_trim(&self) -> bool {
        self.blocks.is_over()
    }

    /// The index after the last cluster that anybody refers to; `None` if that cannot be told
    /// cheaply. Clusters count that were taken and are not written yet: they lie past the end of
    /// the file until then, and a file that is cut meanwhile would lose them.
    pub(crate) fn used_end(&mut self) -> Result<Option<HostCluster>> {
        let entries = self.geometry.block_entries();
        let order = self.geometry.refcount_order;
        let mut looked_at = 0;
        for index in (0..self.table.len()).rev() {
            if self.table[index] == 0 {
                continue;
            }
            let first = HostCluster(to_u64(index) * entries);
            if let Some((table, _)) = self.block(first)?
                && let Some(last) = table.bytes().iter().rposition(|byte| *byte != 0)
            {
                // The byte may hold several counts, or be part of one.
                let to = (((last + 1) * 8 - 1) >> order) + 1;
                let last = (0..to).rev().find(|i| get(table.bytes(), *i, order) != 0);
                return Ok(last.map(|i| first + to_u64(i) + 1));
            }
            if self.blocks.is_over() {
                self.blocks.shrink();
            }
            looked_at += 1;
            if looked_at > MAX_EMPTY_BLOCKS {
                return Ok(None);
            }
        }
        Ok(Some(HostCluster(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Progress;
    use crate::qcow2::create::{CreateOptions, create};
    use crate::storage::memory::MemoryStorage;

    /// An image of 512-byte clusters, with counts of `1 << order` bits.
    pub(super) fn small_clusters(order: u32) -> (Arc<dyn Storage>, Header, Refcounts) {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options = CreateOptions {
            size: 1 << 20,
            cluster_size: Some(512),
            refcount_bits: Some(1 << order),
            ..CreateOptions::default()
        };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let header = Header::read(&*storage).unwrap();
        let counts = Refcounts::open(&storage, &header, 1 << 20).unwrap();
        (storage, header, counts)
    }

    /// A long L1 table or refcount table of an image of small clusters, say.
    #[test]
    fn a_run_may_be_longer_than_the_range_of_a_block() {
        for (order, lens) in [(4, [255, 256, 257, 1000, 5000]), (6, [63, 64, 130, 4000, 9000])] {
            let (_storage, _header, mut counts) = small_clusters(order);
            let mut taken: Vec<Run> = Vec::new();
            for len in lens {
                let run = counts.allocate(len, true, &|_| None).unwrap();
                assert_eq!(run.count, len);
                for cluster in run.clusters() {
                    assert_eq!(counts.get(cluster).unwrap(), 1);
                    assert!(!counts.has_block_in(Run::one(cluster)));
                }
                let parted = |other: &Run| other.end() <= run.first || run.end() <= other.first;
                assert!(taken.iter().all(parted), "{run:?} {taken:?}");
                taken.push(run);
                // Small ones find what is left in between.
                taken.push(counts.allocate(1, true, &|_| None).unwrap());
            }
            let total = lens.iter().sum::<u64>();
            let end = counts.used_end().unwrap().unwrap();
            assert!(end.0 < 4 * total + 1000, "{end:?} for {total}");
            let blocks: Vec<Run> = counts.block_runs();
            for block in &blocks {
                assert_eq!(counts.get(block.first).unwrap(), 1, "{block:?}");
            }
        }
    }

    #[test]
    fn the_first_search_for_a_free_cluster_of_a_full_image_stays_within_the_cache() {
        let (storage, header, mut counts) = small_clusters(4);
        // 40 blocks of 256 counts.
        let mut last = HostCluster(0);
        while last < HostCluster(40 * 256) {
            last = counts.allocate(1, true, &|_| None).unwrap().first;
        }
        counts.write_back().unwrap();
        let mut counts = Refcounts::open(&storage, &header, 0).unwrap();
        assert_eq!(counts.allocate(1, true, &|_| None).unwrap().first, last + 1);
        let offset = |block: &Run| header.geometry.offset_of(block.first);
        let blocks = counts.block_runs();
        let here = blocks.iter().filter(|block| counts.blocks.contains(offset(block))).count();
        assert!(here < 12 && blocks.len() > 40, "{here} of {}", blocks.len());
    }
}
