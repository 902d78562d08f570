//! New refcount blocks, and a larger table for them.

use crate::num::{to_u64, to_usize};
use crate::qcow2::header::MAX_REFTABLE_BYTES;
use crate::qcow2::layout::{HostCluster, MAX_HOST, Run};
use crate::{Error, Result};

use super::{Holds, Refcounts, set};

impl Refcounts {
    /// Makes sure that all clusters of a run have a block. If any was missing it says where to look for a
    /// run again: new blocks may have parted this one. One that has to be `exact` has room there.
    pub(super) fn ensure_blocks(
        &mut self,
        run: Run,
        exact: bool,
        holds: Holds<'_>,
    ) -> Result<Option<HostCluster>> {
        let entries = self.geometry.block_entries();
        if exact && run.count >= entries {
            return self.ensure_blocks_aside(run, holds);
        }
        let mut made = false;
        for index in run.first.0 / entries..=(run.end().0 - 1) / entries {
            if index >= to_u64(self.table.len()) {
                self.grow(index, holds)?;
                made = true;
            }
            if self.table[to_usize(index)] == 0 {
                self.check_free(Run::one(HostCluster(index * entries)), holds)?;
                self.make_block(index, HostCluster(index * entries));
                made = true;
            }
        }
        Ok(made.then_some(run.first))
    }

    /// As [`Refcounts::ensure_blocks`] for a run that is longer than what is between two blocks, each at the
    /// start of the range it describes. So if any is missing, as many as the run takes are made in a row
    /// where none is yet, and behind them is room for it.
    fn ensure_blocks_aside(&mut self, run: Run, holds: Holds<'_>) -> Result<Option<HostCluster>> {
        let entries = self.geometry.block_entries();
        let has = |table: &[u64], index| table.get(to_usize(index)).is_some_and(|at| *at != 0);
        let mut range = run.first.0 / entries..=(run.end().0 - 1) / entries;
        if range.all(|index| has(&self.table, index)) {
            return Ok(None);
        }
        let blocks = run.count.div_ceil(entries - 1);
        let mut first = run.first.0 / entries;
        while let Some(there) = (first..first + blocks).rev().find(|index| has(&self.table, *index))
        {
            first = there + 1;
        }
        if first + blocks > to_u64(self.table.len()) {
            self.grow(first + blocks - 1, holds)?;
            return Ok(Some(run.first));
        }
        let start = Run { first: HostCluster(first * entries), count: blocks };
        self.check_free(start, holds)?;
        for (index, cluster) in (first..).zip(start.clusters()) {
            self.make_block(index, cluster);
        }
        for cluster in start.clusters() {
            self.set(cluster, 1)?;
        }
        Ok(Some(start.end()))
    }

    /// Makes the block `index` at `cluster`, which is in the range of a block that exists or of
    /// this one. On disk the table refers to it only after the block is durable.
    fn make_block(&mut self, index: u64, cluster: HostCluster) {
        let offset = self.geometry.offset_of(cluster);
        let bytes = vec![0; to_usize(self.geometry.cluster_size())];
        let order = self.geometry.refcount_order;
        let entries = self.geometry.block_entries();
        self.block_set.insert(cluster);
        let table = self.blocks.insert(offset, bytes);
        if cluster.0 / entries == index {
            set(table, to_usize(cluster.0 % entries), order, 1);
        }
        let index = to_usize(index);
        self.table[index] = offset.0;
        self.table_dirty = Some(match self.table_dirty.take() {
            Some(old) => old.start.min(index)..old.end.max(index + 1),
            None => index..index + 1,
        });
    }

    /// Gives the table a larger place so that it has an entry `index`.
    ///
    /// The new table and blocks that describe it lie in ranges no block described before, hence
    /// free. The next switch writes them and makes them valid ([`super::moved`]); until then the old
    /// table is in force and nothing on disk refers to the new one.
    fn grow(&mut self, index: u64, holds: Holds<'_>) -> Result<()> {
        let geometry = self.geometry;
        let entries = geometry.block_entries();
        let old_entries = to_u64(self.table.len());
        let first_block = old_entries.max(index);
        // Half as much again, so that growth is rare; room for the blocks that describe the table.
        let mut wanted = first_block + 1 + old_entries / 2;
        let (clusters, blocks) = loop {
            let clusters = geometry.clusters(wanted * 8);
            let blocks = clusters.div_ceil(entries - 1);
            if clusters * geometry.cluster_size() / 8 >= first_block + blocks {
                break (clusters, blocks);
            }
            wanted += blocks;
        };
        if clusters << geometry.cluster_bits > MAX_REFTABLE_BYTES.max(geometry.cluster_size()) {
            return Err(Error::NotSupported(format!(
                "Image '{}' cannot grow any more: its refcount table is at its largest",
                self.storage.name()
            )));
        }
        let start = HostCluster(first_block * entries);
        let table_run = Run { first: start + blocks, count: clusters };
        if geometry.offset_of(table_run.end()).0 >= MAX_HOST {
            return Err(Error::NotSupported(format!(
                "Image '{}' cannot grow any more",
                self.storage.name()
            )));
        }
        self.check_free(Run { first: start, count: blocks + clusters }, holds)?;
        self.table.resize(to_usize(clusters * geometry.cluster_size() / 8), 0);
        for n in 0..blocks {
            self.make_block(first_block + n, start + n);
        }
        for cluster in (Run { first: start, count: blocks + clusters }).clusters() {
            self.set(cluster, 1)?;
        }
        // A place that it was to move to has nothing yet.
        match self.next.replace(table_run) {
            Some(unused) => self.sub(unused, |_| {}),
            None => Ok(()),
        }
    }
}
