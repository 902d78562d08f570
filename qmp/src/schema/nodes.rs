//! Block nodes, their images, and the devices that use them.

use super::macros::{enums, objects};
use super::{
    BlockDeviceIoStatus, BlockDirtyInfo, BlockdevDetectZeroesOptions, BlockdevOptionsRef,
    ImageInfoSpecific, IoLimits,
};

enums! {
    /// What a request to a node does.
    IoOperationType {
        /// It reads.
        Read = "read",
        /// It writes.
        Write = "write",
    }

    /// What is done about a failed request.
    BlockErrorAction {
        /// Nothing.
        Ignore = "ignore",
        /// The guest is told.
        Report = "report",
        /// The guest is stopped.
        Stop = "stop",
    }
}

objects! {
    /// Arguments of `query-named-block-nodes`.
    NamedNodesArguments {
        /// Leave out the images' `backing-image`, which are listed as nodes anyway.
        "flat" flat: Option<bool>,
    }

    /// Arguments of `blockdev-del`.
    BlockdevDelArguments {
        /// The node.
        "node-name" node_name: String,
    }

    /// Arguments of `blockdev-reopen`.
    BlockdevReopenArguments {
        /// Options of each node, as for `blockdev-add`.
        "options" options: Vec<BlockdevOptionsRef>,
    }

    /// Arguments of `block_resize`.
    BlockResizeArguments {
        /// The backend; none has a name here.
        "device" device: Option<String>,
        /// The node.
        "node-name" node_name: Option<String>,
        /// The new size in bytes.
        "size" size: i64,
    }

    /// An internal snapshot of an image.
    SnapshotInfo {
        /// The id, unique in the image.
        "id" id: String,
        /// The tag.
        "name" name: String,
        /// Bytes of machine state; 0 if there is none.
        "vm-state-size" vm_state_size: i64,
        /// When it was taken, in seconds since 1970.
        "date-sec" date_sec: i64,
        /// The nanoseconds of it.
        "date-nsec" date_nsec: i64,
        /// The guest's clock then, seconds.
        "vm-clock-sec" vm_clock_sec: i64,
        /// The nanoseconds of it.
        "vm-clock-nsec" vm_clock_nsec: i64,
        /// Instructions executed, when they are counted.
        "icount" icount: Option<i64>,
    }

    /// An image.
    ImageInfo {
        /// The file.
        "filename" filename: String,
        /// The format's driver.
        "format" format: String,
        /// Whether it was not closed cleanly.
        "dirty-flag" dirty_flag: Option<bool>,
        /// Bytes on the host's disk.
        "actual-size" actual_size: Option<i64>,
        /// Bytes that the guest sees.
        "virtual-size" virtual_size: i64,
        /// Bytes of a cluster.
        "cluster-size" cluster_size: Option<i64>,
        /// Whether it is encrypted.
        "encrypted" encrypted: Option<bool>,
        /// Whether it is compressed.
        "compressed" compressed: Option<bool>,
        /// The backing file, as named in the image.
        "backing-filename" backing_filename: Option<String>,
        /// The backing file, as found.
        "full-backing-filename" full_backing_filename: Option<String>,
        /// The format of the backing file.
        "backing-filename-format" backing_filename_format: Option<String>,
        /// Internal snapshots; left out if there are none.
        "snapshots" snapshots: Option<Vec<SnapshotInfo>>,
        /// The backing image; left out with `flat`.
        "backing-image" backing_image: Option<Box<ImageInfo>>,
        /// What only this format has.
        "format-specific" format_specific: Option<ImageInfoSpecific>,
    }

    /// How a node uses the host's cache.
    BlockdevCacheInfo {
        /// Whether writes may stay in the cache until a flush.
        "writeback" writeback: bool,
        /// Whether the host's page cache is bypassed.
        "direct" direct: bool,
        /// Whether flushes are ignored.
        "no-flush" no_flush: bool,
    }

    /// A block node.
    BlockDeviceInfo {
        /// The file.
        "file" file: String,
        /// The node's name.
        "node-name" node_name: Option<String>,
        /// Whether it is read-only.
        "ro" ro: bool,
        /// The driver.
        "drv" drv: String,
        /// The backing file, if there is one.
        "backing_file" backing_file: Option<String>,
        /// How many backing files there are, one behind the other.
        "backing_file_depth" backing_file_depth: i64,
        /// Whether the image is in use by this process.
        "active" active: bool,
        /// Whether it is encrypted.
        "encrypted" encrypted: bool,
        /// What is done with zeroes written.
        "detect_zeroes" detect_zeroes: BlockdevDetectZeroesOptions,
        /// The image.
        "image" image: ImageInfo,
        /// The use of the cache.
        "cache" cache: BlockdevCacheInfo,
        /// Offset above which a write is reported; 0 is off.
        "write_threshold" write_threshold: i64,
        /// Dirty bitmaps; left out if there are none.
        "dirty-bitmaps" dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
    } ..limits: IoLimits

    /// A block device.
    BlockInfo {
        /// The backend's name; empty for nodes from `--blockdev`.
        "device" device: String,
        /// The device's path or id.
        "qdev" qdev: Option<String>,
        /// Always "unknown".
        "type" kind: String,
        /// Whether the medium can be removed.
        "removable" removable: bool,
        /// Whether the guest has locked it.
        "locked" locked: bool,
        /// The node that it uses.
        "inserted" inserted: Option<BlockDeviceInfo>,
        /// Whether I/O works.
        "io-status" io_status: Option<BlockDeviceIoStatus>,
    }
}
