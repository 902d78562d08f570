//! The commands that start a copy: backup, mirror, commit, stream.

use super::NewImageMode;
use super::macros::{enums, objects};

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
}

objects! {
    /// What is asked for of every backup.
    BackupCommon {
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
    }

    /// Arguments of `blockdev-backup`.
    BackupArguments ..common: BackupCommon {
        /// The node to copy to.
        "target" target: String,
    }

    /// Arguments of `drive-backup`.
    DriveBackupArguments ..common: BackupCommon {
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
        "granularity" granularity: Option<u32>,
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
        "granularity" granularity: Option<u32>,
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
