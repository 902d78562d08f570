//! Block jobs: what starts one, what is told of it and asked of it.

use serde_json::{Map, Value};

use super::graph::NewImageMode;
use super::macros::{enums, objects};
use super::types::{JobStatus, JobType};
use super::{BlockdevRef, Branch, Qapi, Type, UnionInfo};

enums! {
    /// What a block job does when a read or write of it fails.
    BlockdevOnError {
        /// The job fails.
        Report = "report",
        /// It goes on, and tries again later.
        Ignore = "ignore",
        /// It pauses where there is no space, else it fails.
        Enospc = "enospc",
        /// It pauses, and tries again when it is resumed.
        Stop = "stop",
        /// As the device does.
        Auto = "auto",
    }

    /// Which parts of a disk are copied.
    MirrorSyncMode {
        /// What the topmost image has.
        Top = "top",
        /// All of it.
        Full = "full",
        /// Only what is written from now on.
        None = "none",
        /// What a dirty bitmap says; the bitmap is cleaned on success.
        Incremental = "incremental",
        /// What a dirty bitmap says; `bitmap-mode` tells what becomes of the bitmap.
        Bitmap = "bitmap",
    }

    /// What becomes of a dirty bitmap that a backup was made from.
    BitmapSyncMode {
        /// It is cleaned of what was copied if the job succeeds.
        OnSuccess = "on-success",
        /// It stays as it is.
        Never = "never",
        /// It is cleaned of what was copied, even if the job fails.
        Always = "always",
    }

    /// When a mirror copies what is written.
    MirrorCopyMode {
        /// Later.
        Background = "background",
        /// Before the write is completed.
        WriteBlocking = "write-blocking",
    }

    /// How much of an image's space is taken when it is made.
    PreallocMode {
        /// None.
        Off = "off",
        /// Its tables.
        Metadata = "metadata",
        /// All, without writing it.
        Falloc = "falloc",
        /// All, by writing it.
        Full = "full",
    }

    /// Versions of the qcow2 format.
    BlockdevQcow2Version {
        /// `compat=0.10`.
        V2 = "v2",
        /// `compat=1.1`.
        V3 = "v3",
    }

    /// How clusters are compressed.
    Qcow2CompressionType {
        /// Deflate.
        Zlib = "zlib",
        /// Zstandard.
        Zstd = "zstd",
    }

    /// Whether the I/O of a job or device works.
    BlockDeviceIoStatus {
        /// It does.
        Ok = "ok",
        /// A request failed.
        Failed = "failed",
        /// A request failed as there was no space.
        Nospace = "nospace",
    }
}

objects! {
    /// A block job, from `query-block-jobs`.
    BlockJobInfo {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "device" device: String,
        /// The expected progress at the end.
        "len" len: i64,
        /// Done so far.
        "offset" offset: i64,
        /// Whether it does something at the moment.
        "busy" busy: bool,
        /// Whether it is paused, or is to be.
        "paused" paused: bool,
        /// Its limit in bytes a second; 0 is none.
        "speed" speed: i64,
        /// Whether its I/O works.
        "io-status" io_status: BlockDeviceIoStatus,
        /// Whether it may be completed.
        "ready" ready: bool,
        /// Its state.
        "status" status: JobStatus,
        /// Whether it finalizes by itself.
        "auto-finalize" auto_finalize: bool,
        /// Whether it disappears by itself.
        "auto-dismiss" auto_dismiss: bool,
        /// Why it failed; left out while it did not.
        "error" error: Option<String>,
        /// Of a mirror: whether the target has all of the source, and each write goes to both.
        "actively-synced" actively_synced: Option<bool>,
    }

    /// Arguments of the commands about one block job.
    BlockJobArguments {
        /// The job.
        "device" device: String,
    }

    /// Arguments of `block-job-cancel`.
    BlockJobCancelArguments {
        /// The job.
        "device" device: String,
        /// Whether a paused job is cancelled too, and one that is ready gives up.
        "force" force: Option<bool>,
    }

    /// Arguments of `block-job-set-speed`.
    BlockJobSpeedArguments {
        /// The job.
        "device" device: String,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: i64,
    }

    /// Arguments of `block-job-change`.
    BlockJobChangeArguments {
        /// The job.
        "id" id: String,
        /// What kind of job it is.
        "type" kind: JobType,
        /// Of a mirror: when it copies what is written; it can only become `write-blocking`.
        "copy-mode" copy_mode: Option<MirrorCopyMode>,
    }

    /// A file, from `blockdev-create`.
    BlockdevCreateOptionsFile {
        /// Its path.
        "filename" filename: String,
        /// Bytes.
        "size" size: u64,
        /// What of its space is taken now.
        "preallocation" preallocation: Option<PreallocMode>,
        /// Whether it is written in place on btrfs.
        "nocow" nocow: Option<bool>,
    }

    /// A qcow2 image, from `blockdev-create`.
    BlockdevCreateOptionsQcow2 {
        /// The node that it is made in, or a file by its `driver` and `filename`.
        "file" file: BlockdevRef,
        /// The same for its data, if that is to be elsewhere.
        "data-file" data_file: Option<BlockdevRef>,
        /// Whether the data file stays a raw image.
        "data-file-raw" data_file_raw: Option<bool>,
        /// Whether clusters have subclusters.
        "extended-l2" extended_l2: Option<bool>,
        /// Bytes of the disk.
        "size" size: u64,
        /// Version of the format; v3 by default.
        "version" version: Option<BlockdevQcow2Version>,
        /// What it is to call its backing file; not looked at.
        "backing-file" backing_file: Option<String>,
        /// The format of it.
        "backing-fmt" backing_fmt: Option<String>,
        /// Encryption; refused.
        "encrypt" encrypt: Option<Value>,
        /// Bytes of a cluster.
        "cluster-size" cluster_size: Option<u64>,
        /// What of its space is taken now.
        "preallocation" preallocation: Option<PreallocMode>,
        /// Whether refcounts may be written late.
        "lazy-refcounts" lazy_refcounts: Option<bool>,
        /// Width of a refcount.
        "refcount-bits" refcount_bits: Option<i64>,
        /// How clusters are compressed.
        "compression-type" compression_type: Option<Qcow2CompressionType>,
    }

    /// Arguments of `blockdev-create`.
    CreateArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The image.
        "options" options: BlockdevCreateOptions,
    }

    /// Arguments of `blockdev-backup`.
    BackupArguments {
        /// The job to create.
        "job-id" job_id: Option<String>,
        /// The node to copy.
        "device" device: String,
        /// What is copied.
        "sync" sync: MirrorSyncMode,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: Option<i64>,
        /// The dirty bitmap that tells what is copied.
        "bitmap" bitmap: Option<String>,
        /// What becomes of the bitmap.
        "bitmap-mode" bitmap_mode: Option<BitmapSyncMode>,
        /// Whether the target compresses.
        "compress" compress: Option<bool>,
        /// What happens when the source cannot be read; `report` by default.
        "on-source-error" on_source_error: Option<BlockdevOnError>,
        /// What happens when the target cannot be written; `report` by default.
        "on-target-error" on_target_error: Option<BlockdevOnError>,
        /// Whether it finalizes by itself; it does by default.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it disappears by itself; it does by default.
        "auto-dismiss" auto_dismiss: Option<bool>,
        /// Name of the filter that copies before writes.
        "filter-node-name" filter_node_name: Option<String>,
        /// The node to copy to.
        "target" target: String,
    }

    /// Arguments of `drive-backup`.
    DriveBackupArguments {
        /// The job to create.
        "job-id" job_id: Option<String>,
        /// The node to copy.
        "device" device: String,
        /// What is copied.
        "sync" sync: MirrorSyncMode,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: Option<i64>,
        /// The dirty bitmap that tells what is copied.
        "bitmap" bitmap: Option<String>,
        /// What becomes of the bitmap.
        "bitmap-mode" bitmap_mode: Option<BitmapSyncMode>,
        /// Whether the target compresses.
        "compress" compress: Option<bool>,
        /// What happens when the source cannot be read; `report` by default.
        "on-source-error" on_source_error: Option<BlockdevOnError>,
        /// What happens when the target cannot be written; `report` by default.
        "on-target-error" on_target_error: Option<BlockdevOnError>,
        /// Whether it finalizes by itself; it does by default.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it disappears by itself; it does by default.
        "auto-dismiss" auto_dismiss: Option<bool>,
        /// Name of the filter that copies before writes.
        "filter-node-name" filter_node_name: Option<String>,
        /// The file to copy to.
        "target" target: String,
        /// Its format; by default that of the node, or of the file that is there.
        "format" format: Option<String>,
        /// Whether the file is created, as by default, or there already.
        "mode" mode: Option<NewImageMode>,
    }

    /// Arguments of `drive-mirror`.
    DriveMirrorArguments {
        /// The job to create.
        "job-id" job_id: Option<String>,
        /// The node to copy.
        "device" device: String,
        /// The file to copy to.
        "target" target: String,
        /// Its format; by default that of the node, or of the file that is there.
        "format" format: Option<String>,
        /// The name of the target's node; one is made up without it.
        "node-name" node_name: Option<String>,
        /// The node that the target takes the place of; `device` by default.
        "replaces" replaces: Option<String>,
        /// What is copied.
        "sync" sync: MirrorSyncMode,
        /// Whether the file is created, as by default, or there already.
        "mode" mode: Option<NewImageMode>,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: Option<i64>,
        /// Bytes that one bit of the dirty bitmap stands for.
        "granularity" granularity: Option<i64>,
        /// Bytes that may be in flight.
        "buf-size" buf_size: Option<i64>,
        /// What happens when the source cannot be read; `report` by default.
        "on-source-error" on_source_error: Option<BlockdevOnError>,
        /// What happens when the target cannot be written; `report` by default.
        "on-target-error" on_target_error: Option<BlockdevOnError>,
        /// Whether zeroes take no space in the target; they do not by default.
        "unmap" unmap: Option<bool>,
        /// When it copies what is written; `background` by default.
        "copy-mode" copy_mode: Option<MirrorCopyMode>,
        /// Whether it finalizes by itself; it does by default.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it disappears by itself; it does by default.
        "auto-dismiss" auto_dismiss: Option<bool>,
    }

    /// Arguments of `blockdev-mirror`.
    MirrorArguments {
        /// The job to create.
        "job-id" job_id: Option<String>,
        /// The node to copy.
        "device" device: String,
        /// The node to copy to.
        "target" target: String,
        /// The node that the target takes the place of; `device` by default.
        "replaces" replaces: Option<String>,
        /// What is copied.
        "sync" sync: MirrorSyncMode,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: Option<i64>,
        /// Bytes that one bit of the dirty bitmap stands for.
        "granularity" granularity: Option<i64>,
        /// Bytes that may be in flight.
        "buf-size" buf_size: Option<i64>,
        /// What happens when the source cannot be read; `report` by default.
        "on-source-error" on_source_error: Option<BlockdevOnError>,
        /// What happens when the target cannot be written; `report` by default.
        "on-target-error" on_target_error: Option<BlockdevOnError>,
        /// Name of the filter that sees the writes.
        "filter-node-name" filter_node_name: Option<String>,
        /// When it copies what is written; `background` by default.
        "copy-mode" copy_mode: Option<MirrorCopyMode>,
        /// Whether it finalizes by itself; it does by default.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it disappears by itself; it does by default.
        "auto-dismiss" auto_dismiss: Option<bool>,
    }

    /// Arguments of `block-commit`.
    CommitArguments {
        /// The job to create.
        "job-id" job_id: Option<String>,
        /// The node at the top of the chain.
        "device" device: String,
        /// The image that is written to.
        "base-node" base_node: Option<String>,
        /// The same, by its file name.
        "base" base: Option<String>,
        /// The topmost image whose data is written down; `device` by default.
        "top-node" top_node: Option<String>,
        /// The same, by its file name.
        "top" top: Option<String>,
        /// What the image above `top` is to call its backing file.
        "backing-file" backing_file: Option<String>,
        /// Whether a raw backing file is recorded as "raw" where a protocol is meant.
        "backing-mask-protocol" backing_mask_protocol: Option<bool>,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: Option<i64>,
        /// What happens when a read or write fails; `report` by default.
        "on-error" on_error: Option<BlockdevOnError>,
        /// Name of the filter above `top`.
        "filter-node-name" filter_node_name: Option<String>,
        /// Whether it finalizes by itself; it does by default.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it disappears by itself; it does by default.
        "auto-dismiss" auto_dismiss: Option<bool>,
    }

    /// Arguments of `block-stream`.
    StreamArguments {
        /// The job to create.
        "job-id" job_id: Option<String>,
        /// The node that gets the data of those below.
        "device" device: String,
        /// The image below that stays the backing file, by its file name.
        "base" base: Option<String>,
        /// The same, by its node.
        "base-node" base_node: Option<String>,
        /// What the image is to call its backing file.
        "backing-file" backing_file: Option<String>,
        /// Whether a raw backing file is recorded as "raw" where a protocol is meant.
        "backing-mask-protocol" backing_mask_protocol: Option<bool>,
        /// The last node whose data is copied.
        "bottom" bottom: Option<String>,
        /// Bytes a second at most; 0 is no limit.
        "speed" speed: Option<i64>,
        /// What happens when a read or write fails; `report` by default.
        "on-error" on_error: Option<BlockdevOnError>,
        /// Name of the filter above `device`.
        "filter-node-name" filter_node_name: Option<String>,
        /// Whether it finalizes by itself; it does by default.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it disappears by itself; it does by default.
        "auto-dismiss" auto_dismiss: Option<bool>,
    }
}

/// An image to be made: a flat union by `driver`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct BlockdevCreateOptions(pub Map<String, Value>);

impl Qapi for BlockdevCreateOptions {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "BlockdevCreateOptions",
        doc: "An image to be made.",
        tag: "driver",
        branches: &[
            Branch { value: "file", members: BlockdevCreateOptionsFile::MEMBERS },
            Branch { value: "qcow2", members: BlockdevCreateOptionsQcow2::MEMBERS },
            // They are there, and make no images.
            Branch { value: "raw", members: &[] },
            Branch { value: "host_device", members: &[] },
            Branch { value: "compress", members: &[] },
        ],
    });
}
