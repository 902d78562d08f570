//! What lies where in a new image.

use crate::num::to_usize;
use crate::qcow2::header::{MAX_L1_BYTES, MAX_REFTABLE_BYTES};
use crate::{Error, Result};

use super::maps;
use super::options::Plan;

/// Numbers of clusters, in the order of the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    cluster_bits: u32,
    refcount_order: u32,
    pub(super) l2_entry_len: usize,
    pub(super) table_clusters: u64,
    pub(super) blocks: u64,
    pub(super) l1_entries: u32,
    pub(super) l1_clusters: u64,
    pub(super) l2_tables: u64,
    /// Guest clusters that have a place.
    pub(super) data_clusters: u64,
    /// Those of them that are in this file.
    own_clusters: u64,
}

impl Layout {
    /// Lays an image out.
    ///
    /// # Errors
    /// The disk is too large for tables with these clusters.
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        let too_large = || {
            Error::Invalid(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
                    .to_owned(),
            )
        };
        let cluster = 1u64 << plan.cluster_bits;
        let l2_entry_len = if plan.extended_l2 { 16 } else { 8 };
        let coverage = (cluster / l2_entry_len) << plan.cluster_bits;
        let l1 = plan.size.div_ceil(coverage);
        if l1 * 8 > MAX_L1_BYTES {
            return Err(too_large());
        }
        let guest = plan.size.div_ceil(cluster);
        let mapped = maps(plan.preallocation);
        let mut layout = Self {
            cluster_bits: plan.cluster_bits,
            refcount_order: plan.refcount_order,
            l2_entry_len: to_usize(l2_entry_len),
            table_clusters: 1,
            blocks: 1,
            l1_entries: u32::try_from(l1).map_err(|_| too_large())?,
            l1_clusters: (l1 * 8).div_ceil(cluster),
            l2_tables: if mapped { l1 } else { 0 },
            data_clusters: if mapped { guest } else { 0 },
            own_clusters: if mapped && !plan.external { guest } else { 0 },
        };
        // Blocks and table count themselves too; both only grow, by less each time.
        loop {
            let blocks = layout.clusters().div_ceil(layout.block_entries());
            let table_clusters = (blocks * 8).div_ceil(cluster);
            if blocks <= layout.blocks && table_clusters <= layout.table_clusters {
                break;
            }
            layout.blocks = blocks.max(layout.blocks);
            layout.table_clusters = table_clusters.max(layout.table_clusters);
        }
        if layout.table_clusters * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(too_large());
        }
        Ok(layout)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn block_entries(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    pub(super) fn offset(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    pub(super) fn first_table(&self) -> u64 {
        1
    }

    pub(super) fn first_block(&self) -> u64 {
        self.first_table() + self.table_clusters
    }

    pub(super) fn first_l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    pub(super) fn first_l2(&self) -> u64 {
        self.first_l1() + self.l1_clusters
    }

    /// Where the guest's data begins.
    pub(super) fn data_offset(&self) -> u64 {
        self.offset(self.first_l2() + self.l2_tables)
    }

    /// All clusters of the file.
    pub(super) fn clusters(&self) -> u64 {
        self.first_l2() + self.l2_tables + self.own_clusters
    }

    /// Bytes of the file.
    pub(super) fn end(&self) -> u64 {
        self.offset(self.clusters())
    }

    /// Bytes of L2 tables to be written.
    pub(super) fn table_bytes(&self) -> u64 {
        self.offset(self.l2_tables)
    }

    /// Sets the first `count` refcounts of a block to 1.
    pub(super) fn count(&self, block: &mut [u8], count: u64) {
        let count = to_usize(count);
        if self.refcount_order < 3 {
            let width = 1 << self.refcount_order;
            for index in 0..count {
                block[index * width / 8] |= 1 << (index * width % 8);
            }
            return;
        }
        for refcount in block.chunks_exact_mut(1 << (self.refcount_order - 3)).take(count) {
            if let Some(last) = refcount.last_mut() {
                *last = 1;
            }
        }
    }
}
