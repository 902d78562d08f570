//! query-blockstats.

use devices::virtio::block::{IoCounters, IoKind, IoSums};
use qmp::schema::{BlockDeviceStats, BlockStats, BlockStatsArguments};

use super::Controller;
use crate::machine::devices::VirtioSlot;

impl Controller {
    /// What the requests of the machine's disks come to, in the order of their slots.
    ///
    /// # Errors
    /// Nodes are asked for.
    pub(super) fn block_stats(
        &self,
        arguments: &BlockStatsArguments,
    ) -> Result<Vec<BlockStats>, qmp::Error> {
        refuse_nodes(arguments)?;
        let disks = self.machine.devices().virtio().filter(|slot| slot.disk().is_some());
        Ok(disks.filter_map(of_slot).collect())
    }
}

/// Nodes do not count their requests.
pub(super) fn refuse_nodes(arguments: &BlockStatsArguments) -> Result<(), qmp::Error> {
    match arguments.query_nodes {
        Some(true) => Err(qmp::Error::generic("Parameter 'query-nodes' is not supported")),
        _ => Ok(()),
    }
}

fn of_slot(slot: &VirtioSlot) -> Option<BlockStats> {
    Some(BlockStats {
        device: Some(String::new()),
        qdev: Some(slot.path.clone()),
        node_name: slot.disk().map(|(node, _)| node.name().to_owned()),
        stats: stats(slot.counters.as_ref()?),
    })
}

fn stats(counters: &IoCounters) -> BlockDeviceStats {
    let [read, write, flush, unmap]: [IoSums; 4] =
        [IoKind::Read, IoKind::Write, IoKind::Flush, IoKind::Unmap].map(|kind| counters.sums(kind));
    BlockDeviceStats {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes,
        zone_append_bytes: 0,
        unmap_bytes: unmap.bytes,
        rd_operations: read.operations,
        wr_operations: write.operations,
        zone_append_operations: 0,
        flush_operations: flush.operations,
        unmap_operations: unmap.operations,
        rd_total_time_ns: read.nanoseconds,
        wr_total_time_ns: write.nanoseconds,
        zone_append_total_time_ns: 0,
        flush_total_time_ns: flush.nanoseconds,
        unmap_total_time_ns: unmap.nanoseconds,
        wr_highest_offset: counters.highest_write(),
        rd_merged: 0,
        wr_merged: 0,
        zone_append_merged: 0,
        unmap_merged: 0,
        idle_time_ns: counters.idle_nanoseconds(),
        failed_rd_operations: read.failed,
        failed_wr_operations: write.failed,
        failed_zone_append_operations: 0,
        failed_flush_operations: flush.failed,
        failed_unmap_operations: unmap.failed,
        invalid_rd_operations: read.invalid,
        invalid_wr_operations: write.invalid,
        invalid_zone_append_operations: 0,
        invalid_flush_operations: flush.invalid,
        invalid_unmap_operations: unmap.invalid,
        account_invalid: true,
        account_failed: true,
        timed_stats: Vec::new(),
    }
}
