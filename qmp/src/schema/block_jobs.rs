//! Block jobs: what is told of one and asked of it.

use super::macros::{enums, objects};
use super::{JobStatus, JobType, MirrorCopyMode};

enums! {
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
}
