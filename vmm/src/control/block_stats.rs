//! query-blockstats.

use std::sync::Arc;

use block::storage::Discards;
use block::{Graph, Node};
use devices::virtio::block::{IoCounters, IoKind, IoSums};
use qmp::schema::{
    BlockDeviceStats, BlockStats, BlockStatsArguments, BlockStatsSpecific, BlockStatsSpecificFile,
};

use super::Controller;
use crate::machine::devices::VirtioSlot;

/// Most images that are told of one in the other: parsers of JSON refuse to go much deeper.
const MOST_NESTED: usize = 200;

impl Controller {
    /// What the requests of the machine's disks come to, in the order of their slots; or all nodes.
    pub(super) fn block_stats(&self, arguments: &BlockStatsArguments) -> Vec<BlockStats> {
        if arguments.query_nodes == Some(true) {
            return of_nodes(self.blocks.graph());
        }
        let disks = self.machine.devices().virtio().filter(|slot| slot.disk().is_some());
        disks.filter_map(of_slot).collect()
    }
}

/// What is told of the nodes, the oldest first, as in QEMU.
pub(super) fn of_nodes(graph: &Graph) -> Vec<BlockStats> {
    graph.list().iter().rev().map(|node| of_node(node)).collect()
}

fn of_slot(slot: &VirtioSlot) -> Option<BlockStats> {
    let (node, _) = slot.disk()?;
    let stats = of_requests(slot.counters.as_ref()?, node.highest_write());
    let below = |node: &Arc<Node>| node.backing();
    let chain: Vec<Arc<Node>> =
        std::iter::successors(node.backing(), below).take(MOST_NESTED).collect();
    let backing = chain
        .iter()
        .rev()
        .fold(None, |backing, node| Some(Box::new(BlockStats { backing, ..of_node(node) })));
    Some(BlockStats {
        device: Some(String::new()),
        qdev: Some(slot.path.clone()),
        stats,
        backing,
        ..of_node(&node)
    })
}

/// A node with the node of its file.
fn of_node(node: &Node) -> BlockStats {
    BlockStats {
        device: None,
        qdev: None,
        node_name: Some(node.name().to_owned()),
        stats: uncounted(node.highest_write()),
        driver_specific: node.file_discards().map(|discards| of_file(node.driver(), discards)),
        parent: node.file_node().map(|file| Box::new(of_node(&file))),
        backing: None,
    }
}

fn of_file(driver: &str, Discards { done, failed, bytes }: Discards) -> BlockStatsSpecific {
    let file =
        BlockStatsSpecificFile { discards: done, failed_discards: failed, discarded_bytes: bytes };
    match driver {
        "host_device" => BlockStatsSpecific::HostDevice(file),
        _ => BlockStatsSpecific::File(file),
    }
}

/// What a device's requests come to.
fn of_requests(counters: &IoCounters, highest_write: u64) -> BlockDeviceStats {
    let [read, write, flush, unmap]: [IoSums; 4] =
        [IoKind::Read, IoKind::Write, IoKind::Flush, IoKind::Unmap].map(|kind| counters.sums(kind));
    BlockDeviceStats {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes,
        unmap_bytes: unmap.bytes,
        rd_operations: read.operations,
        wr_operations: write.operations,
        flush_operations: flush.operations,
        unmap_operations: unmap.operations,
        rd_total_time_ns: read.nanoseconds,
        wr_total_time_ns: write.nanoseconds,
        flush_total_time_ns: flush.nanoseconds,
        unmap_total_time_ns: unmap.nanoseconds,
        idle_time_ns: counters.idle_nanoseconds(),
        failed_rd_operations: read.failed,
        failed_wr_operations: write.failed,
        failed_flush_operations: flush.failed,
        failed_unmap_operations: unmap.failed,
        invalid_rd_operations: read.invalid,
        invalid_wr_operations: write.invalid,
        invalid_flush_operations: flush.invalid,
        invalid_unmap_operations: unmap.invalid,
        account_invalid: true,
        account_failed: true,
        ..uncounted(highest_write)
    }
}

/// Of a node, whose requests nobody counts. There are no zones, and no requests are joined.
fn uncounted(highest_write: u64) -> BlockDeviceStats {
    BlockDeviceStats {
        rd_bytes: 0,
        wr_bytes: 0,
        zone_append_bytes: 0,
        unmap_bytes: 0,
        rd_operations: 0,
        wr_operations: 0,
        zone_append_operations: 0,
        flush_operations: 0,
        unmap_operations: 0,
        rd_total_time_ns: 0,
        wr_total_time_ns: 0,
        zone_append_total_time_ns: 0,
        flush_total_time_ns: 0,
        unmap_total_time_ns: 0,
        wr_highest_offset: highest_write,
        rd_merged: 0,
        wr_merged: 0,
        zone_append_merged: 0,
        unmap_merged: 0,
        idle_time_ns: None,
        failed_rd_operations: 0,
        failed_wr_operations: 0,
        failed_zone_append_operations: 0,
        failed_flush_operations: 0,
        failed_unmap_operations: 0,
        invalid_rd_operations: 0,
        invalid_wr_operations: 0,
        invalid_zone_append_operations: 0,
        invalid_flush_operations: 0,
        invalid_unmap_operations: 0,
        account_invalid: false,
        account_failed: false,
        timed_stats: Vec::new(),
    }
}
