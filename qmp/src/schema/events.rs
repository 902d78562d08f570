//! The events.

use super::macros::event_enum;
use super::migration::MigrationStatus;
use super::{BlockErrorAction, IoOperationType, JobStatus, JobType, ShutdownCause};

event_enum! {
    /// The guest was stopped.
    Stop = "STOP";

    /// The guest goes on.
    Resume = "RESUME";

    /// The guest's power button was pressed.
    Powerdown = "POWERDOWN";

    /// The machine is shut down; the process may end.
    Shutdown {
        /// Whether the guest asked for it.
        "guest" guest: bool,
        /// Who asked for it.
        "reason" reason: ShutdownCause,
    } = "SHUTDOWN";

    /// The machine was reset.
    Reset {
        /// Whether the guest asked for it.
        "guest" guest: bool,
        /// Who asked for it.
        "reason" reason: ShutdownCause,
    } = "RESET";

    /// A migration is further; with the capability `events`.
    Migration {
        /// How far.
        "status" status: MigrationStatus,
    } = "MIGRATION";

    /// What the guest has written was asked for, to be sent; with the capability `events`.
    MigrationPass {
        /// How often it was.
        "pass" pass: i64,
    } = "MIGRATION_PASS";

    /// An export is gone, and its node is free.
    BlockExportDeleted {
        /// The export.
        "id" id: String,
    } = "BLOCK_EXPORT_DELETED";

    /// A request of a disk failed on the host, or one for RAM that a lazy load has still to read. At
    /// most one a second is told of each device: the first at once, of those after it the last.
    BlockIoError {
        /// The device that uses the node, empty if it was for RAM.
        "qom-path" qom_path: String,
        /// The backend; empty for nodes from `--blockdev` and `blockdev-add`.
        "device" device: String,
        /// The node.
        "node-name" node_name: Option<String>,
        /// What was tried.
        "operation" operation: IoOperationType,
        /// What is done about it.
        "action" action: BlockErrorAction,
        /// Whether there was no space; left out where no error stops the machine.
        "nospace" nospace: Option<bool>,
        /// The error.
        "reason" reason: String,
    } = "BLOCK_IO_ERROR";

    /// An image turned out to be damaged while it was in use.
    BlockImageCorrupted {
        /// The backend; empty for nodes from `--blockdev` and `blockdev-add`.
        "device" device: String,
        /// The node.
        "node-name" node_name: Option<String>,
        /// What is wrong.
        "msg" msg: String,
        /// Host offset in bytes of the access that showed it.
        "offset" offset: Option<i64>,
        /// Its length in bytes.
        "size" size: Option<i64>,
        /// Whether the image takes no more writes.
        "fatal" fatal: bool,
    } = "BLOCK_IMAGE_CORRUPTED";

    /// A job went to another state.
    JobStatusChange {
        /// The job.
        "id" id: String,
        /// Its new state.
        "status" status: JobStatus,
    } = "JOB_STATUS_CHANGE";

    /// A block job has ended by itself, or failed.
    BlockJobCompleted {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "device" device: String,
        /// The expected progress at the end.
        "len" len: i64,
        /// The progress.
        "offset" offset: i64,
        /// Its limit in bytes a second; 0 is none.
        "speed" speed: i64,
        /// Why it failed.
        "error" error: Option<String>,
    } = "BLOCK_JOB_COMPLETED";

    /// A block job was cancelled, and has ended.
    BlockJobCancelled {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "device" device: String,
        /// The expected progress at the end.
        "len" len: i64,
        /// The progress.
        "offset" offset: i64,
        /// Its limit in bytes a second; 0 is none.
        "speed" speed: i64,
    } = "BLOCK_JOB_CANCELLED";

    /// A block job could complete whenever it is told to.
    BlockJobReady {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "device" device: String,
        /// The expected progress at the end.
        "len" len: i64,
        /// The progress.
        "offset" offset: i64,
        /// Its limit in bytes a second; 0 is none.
        "speed" speed: i64,
    } = "BLOCK_JOB_READY";

    /// A block job is done, and waits to be finalized.
    BlockJobPending {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "id" id: String,
    } = "BLOCK_JOB_PENDING";

    /// A read or write of a block job failed.
    BlockJobError {
        /// The job.
        "device" device: String,
        /// What was tried.
        "operation" operation: IoOperationType,
        /// What is done about it.
        "action" action: BlockErrorAction,
    } = "BLOCK_JOB_ERROR";
}
