//! The events.

use super::macros::event_enum;
use super::types::{BlockErrorAction, IoOperationType, JobStatus, ShutdownCause};

event_enum! {
    /// The guest was stopped.
    Stop = "STOP";

    /// The guest goes on.
    Resume = "RESUME";

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

    /// An export is gone, and its node is free.
    BlockExportDeleted {
        /// The export.
        "id" id: String,
    } = "BLOCK_EXPORT_DELETED";

    /// A read or write failed. Here: of RAM that a lazy load has still to read.
    BlockIoError {
        /// The device that uses the node, empty if none.
        "qom-path" qom_path: String,
        /// The backend; empty for nodes from `--blockdev` and `blockdev-add`.
        "device" device: String,
        /// The node.
        "node-name" node_name: Option<String>,
        /// What was tried.
        "operation" operation: IoOperationType,
        /// What is done about it.
        "action" action: BlockErrorAction,
        /// Whether there was no space.
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
}
