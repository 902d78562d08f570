//! Limits of disks: `block_set_io_throttle`, and what is told of them.

use super::macros::objects;

objects! {
    /// Arguments of `block_set_io_throttle`. Limits of 0 are none; all of them 0 take the disk out of its
    /// group.
    IoThrottleArguments {
        /// The backend; none has a name here.
        "device" device: Option<String>,
        /// The device's id, or its path where it has none.
        "id" id: Option<String>,
    } ..limits: IoLimits

    /// Limits of a disk's requests, or of those of a group of disks together.
    IoLimits {
        /// Limit of bytes a second.
        "bps" bps: i64,
        /// Limit of bytes read a second.
        "bps_rd" bps_rd: i64,
        /// Limit of bytes written a second.
        "bps_wr" bps_wr: i64,
        /// Limit of requests a second.
        "iops" iops: i64,
        /// Limit of reads a second.
        "iops_rd" iops_rd: i64,
        /// Limit of writes a second.
        "iops_wr" iops_wr: i64,
        /// The same for a while, in a burst.
        "bps_max" bps_max: Option<i64>,
        /// The same for a while, in a burst.
        "bps_rd_max" bps_rd_max: Option<i64>,
        /// The same for a while, in a burst.
        "bps_wr_max" bps_wr_max: Option<i64>,
        /// The same for a while, in a burst.
        "iops_max" iops_max: Option<i64>,
        /// The same for a while, in a burst.
        "iops_rd_max" iops_rd_max: Option<i64>,
        /// The same for a while, in a burst.
        "iops_wr_max" iops_wr_max: Option<i64>,
        /// Seconds that a burst of bytes a second may last at most; default 1.
        "bps_max_length" bps_max_length: Option<i64>,
        /// Seconds that a burst of bytes read a second may last at most; default 1.
        "bps_rd_max_length" bps_rd_max_length: Option<i64>,
        /// Seconds that a burst of bytes written a second may last at most; default 1.
        "bps_wr_max_length" bps_wr_max_length: Option<i64>,
        /// Seconds that a burst of requests a second may last at most; default 1.
        "iops_max_length" iops_max_length: Option<i64>,
        /// Seconds that a burst of reads a second may last at most; default 1.
        "iops_rd_max_length" iops_rd_max_length: Option<i64>,
        /// Seconds that a burst of writes a second may last at most; default 1.
        "iops_wr_max_length" iops_wr_max_length: Option<i64>,
        /// Bytes for which a larger request counts as several; 0 is none.
        "iops_size" iops_size: Option<i64>,
        /// The group of disks that have these limits together. Default: the one that the disk is in, or
        /// one of its own by its name.
        "group" group: Option<String>,
    }
}
