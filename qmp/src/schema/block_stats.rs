//! What block devices have done: `query-blockstats`.

use super::macros::objects;
use super::{Branch, Qapi, Type, UnionInfo};

objects! {
    /// Arguments of `query-blockstats`.
    BlockStatsArguments {
        /// Tell of all nodes, not of devices with the nodes below them. Default false.
        "query-nodes" query_nodes: Option<bool>,
    }

    /// A block device, or a node. Nodes do not count requests: of them only `wr_highest_offset` counts.
    BlockStats {
        /// The backend's name; empty for nodes from `--blockdev`, and left out for a node.
        "device" device: Option<String>,
        /// The device's path or id.
        "qdev" qdev: Option<String>,
        /// The node that it uses.
        "node-name" node_name: Option<String>,
        /// What its requests came to since the start of the program.
        "stats" stats: BlockDeviceStats,
        /// What only this driver has.
        "driver-specific" driver_specific: Option<BlockStatsSpecific>,
        /// The node of the file that the image is in.
        "parent" parent: Option<Box<BlockStats>>,
        /// The image below; told of devices only.
        "backing" backing: Option<Box<BlockStats>>,
    }

    /// Discards of a host file.
    BlockStatsSpecificFile {
        /// Those that succeeded.
        "discard-nb-ok" discards: u64,
        /// Those that failed, or that the host has no call for.
        "discard-nb-failed" failed_discards: u64,
        /// Bytes of those that succeeded.
        "discard-bytes-ok" discarded_bytes: u64,
    }

    /// What requests came to.
    BlockDeviceStats {
        /// Bytes of reads.
        "rd_bytes" rd_bytes: u64,
        /// Bytes of writes.
        "wr_bytes" wr_bytes: u64,
        /// Bytes of appends to a zone; there are none.
        "zone_append_bytes" zone_append_bytes: u64,
        /// Bytes of discards.
        "unmap_bytes" unmap_bytes: u64,
        /// Reads that succeeded.
        "rd_operations" rd_operations: u64,
        /// Writes that succeeded.
        "wr_operations" wr_operations: u64,
        /// Always 0.
        "zone_append_operations" zone_append_operations: u64,
        /// Flushes that succeeded.
        "flush_operations" flush_operations: u64,
        /// Discards that succeeded.
        "unmap_operations" unmap_operations: u64,
        /// Nanoseconds that reads took.
        "rd_total_time_ns" rd_total_time_ns: u64,
        /// Nanoseconds that writes took.
        "wr_total_time_ns" wr_total_time_ns: u64,
        /// Nanoseconds that appends to a zone took.
        "zone_append_total_time_ns" zone_append_total_time_ns: u64,
        /// Nanoseconds that flushes took.
        "flush_total_time_ns" flush_total_time_ns: u64,
        /// Nanoseconds that discards took.
        "unmap_total_time_ns" unmap_total_time_ns: u64,
        /// End of the highest write to the node, by whomever, in bytes.
        "wr_highest_offset" wr_highest_offset: u64,
        /// Requests that were joined with others: always 0.
        "rd_merged" rd_merged: u64,
        /// Requests that were joined with others: always 0.
        "wr_merged" wr_merged: u64,
        /// Requests that were joined with others: always 0.
        "zone_append_merged" zone_append_merged: u64,
        /// Requests that were joined with others: always 0.
        "unmap_merged" unmap_merged: u64,
        /// Nanoseconds since the last request; left out if there was none.
        "idle_time_ns" idle_time_ns: Option<u64>,
        /// Reads that failed.
        "failed_rd_operations" failed_rd_operations: u64,
        /// Writes that failed.
        "failed_wr_operations" failed_wr_operations: u64,
        /// Appends to a zone that failed.
        "failed_zone_append_operations" failed_zone_append_operations: u64,
        /// Flushes that failed.
        "failed_flush_operations" failed_flush_operations: u64,
        /// Discards that failed.
        "failed_unmap_operations" failed_unmap_operations: u64,
        /// Reads that made no sense.
        "invalid_rd_operations" invalid_rd_operations: u64,
        /// Writes that made no sense.
        "invalid_wr_operations" invalid_wr_operations: u64,
        /// Appends to a zone that made no sense.
        "invalid_zone_append_operations" invalid_zone_append_operations: u64,
        /// Flushes that made no sense.
        "invalid_flush_operations" invalid_flush_operations: u64,
        /// Discards that made no sense.
        "invalid_unmap_operations" invalid_unmap_operations: u64,
        /// Whether invalid requests count for `idle_time_ns`: they do.
        "account_invalid" account_invalid: bool,
        /// Whether failed requests count for times: they do.
        "account_failed" account_failed: bool,
        /// Of intervals: there are none.
        "timed_stats" timed_stats: Vec<BlockDeviceTimedStats>,
    }

    /// What requests came to in an interval.
    BlockDeviceTimedStats {
        /// Seconds.
        "interval_length" interval_length: u64,
        /// Shortest time of a request, in nanoseconds.
        "min_rd_latency_ns" min_rd_latency_ns: u64,
        /// Longest time of a request, in nanoseconds.
        "max_rd_latency_ns" max_rd_latency_ns: u64,
        /// Average time of a request, in nanoseconds.
        "avg_rd_latency_ns" avg_rd_latency_ns: u64,
        /// Shortest time of a request, in nanoseconds.
        "min_wr_latency_ns" min_wr_latency_ns: u64,
        /// Longest time of a request, in nanoseconds.
        "max_wr_latency_ns" max_wr_latency_ns: u64,
        /// Average time of a request, in nanoseconds.
        "avg_wr_latency_ns" avg_wr_latency_ns: u64,
        /// Shortest time of a request, in nanoseconds.
        "min_zone_append_latency_ns" min_zone_append_latency_ns: u64,
        /// Longest time of a request, in nanoseconds.
        "max_zone_append_latency_ns" max_zone_append_latency_ns: u64,
        /// Average time of a request, in nanoseconds.
        "avg_zone_append_latency_ns" avg_zone_append_latency_ns: u64,
        /// Shortest time of a request, in nanoseconds.
        "min_flush_latency_ns" min_flush_latency_ns: u64,
        /// Longest time of a request, in nanoseconds.
        "max_flush_latency_ns" max_flush_latency_ns: u64,
        /// Average time of a request, in nanoseconds.
        "avg_flush_latency_ns" avg_flush_latency_ns: u64,
        /// Average of requests in flight.
        "avg_rd_queue_depth" avg_rd_queue_depth: f64,
        /// Average of requests in flight.
        "avg_wr_queue_depth" avg_wr_queue_depth: f64,
        /// Average of requests in flight.
        "avg_zone_append_queue_depth" avg_zone_append_queue_depth: f64,
    }
}

/// What only some drivers have to tell: a flat union by driver.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "driver", rename_all = "snake_case")]
pub enum BlockStatsSpecific {
    /// A file.
    File(BlockStatsSpecificFile),
    /// A block device of the host.
    HostDevice(BlockStatsSpecificFile),
}

impl Qapi for BlockStatsSpecific {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "BlockStatsSpecific",
        doc: "What only some drivers have to tell.",
        tag: "driver",
        branches: &[
            Branch { value: "file", members: BlockStatsSpecificFile::MEMBERS },
            Branch { value: "host_device", members: BlockStatsSpecificFile::MEMBERS },
        ],
    });
}
