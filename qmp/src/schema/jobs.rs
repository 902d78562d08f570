//! Jobs of every kind.

use super::macros::{enums, objects};

enums! {
    /// What a job does.
    JobType {
        /// `block-commit`.
        Commit = "commit",
        /// `block-stream`.
        Stream = "stream",
        /// `blockdev-mirror`.
        Mirror = "mirror",
        /// `blockdev-backup`.
        Backup = "backup",
        /// `blockdev-create`.
        Create = "create",
        /// `x-blockdev-amend`.
        Amend = "amend",
        /// `snapshot-load`.
        SnapshotLoad = "snapshot-load",
        /// `snapshot-save`.
        SnapshotSave = "snapshot-save",
        /// `snapshot-delete`.
        SnapshotDelete = "snapshot-delete",
    }

    /// The state of a job; see [`crate::jobs`].
    JobStatus {
        /// Not yet a job; never seen outside.
        Undefined = "undefined",
        /// Not yet started.
        Created = "created",
        /// At work.
        Running = "running",
        /// At work, but paused.
        Paused = "paused",
        /// At work, and could complete when told to.
        Ready = "ready",
        /// Ready, but paused.
        Standby = "standby",
        /// Done, and waits for the other jobs of its transaction.
        Waiting = "waiting",
        /// Done, and waits to be finalized.
        Pending = "pending",
        /// Failed or cancelled, and cleaning up.
        Aborting = "aborting",
        /// Over; its result can be asked for until it is dismissed.
        Concluded = "concluded",
        /// Gone.
        Null = "null",
    }

    /// What can be asked of a job.
    JobVerb {
        /// End early.
        Cancel = "cancel",
        /// Rest.
        Pause = "pause",
        /// Go on.
        Resume = "resume",
        /// Change the speed.
        SetSpeed = "set-speed",
        /// Complete what is ready.
        Complete = "complete",
        /// Forget a concluded job.
        Dismiss = "dismiss",
        /// Make the results count.
        Finalize = "finalize",
        /// Change options.
        Change = "change",
    }
}

objects! {
    /// Arguments of the commands about one job.
    JobArguments {
        /// The job.
        "id" id: String,
    }

    /// A job, from `query-jobs`.
    JobInfo {
        /// The job.
        "id" id: String,
        /// What it does.
        "type" kind: JobType,
        /// Its state.
        "status" status: JobStatus,
        /// Done so far; only the ratio to the total has a meaning.
        "current-progress" current_progress: i64,
        /// The expected progress at the end.
        "total-progress" total_progress: i64,
        /// Why it failed; left out while it did not.
        "error" error: Option<String>,
        /// Of a save: nanoseconds that it kept a running guest standing, the longest time in one piece.
        "x-pause-ns" pause_ns: Option<i64>,
        /// Of a save that succeeded: bytes of RAM and machine state that were written.
        "x-bytes-written" bytes_written: Option<i64>,
        /// Of a save that succeeded: whether the rest of RAM is shared with an earlier checkpoint.
        "x-incremental" incremental: Option<bool>,
    }
}
