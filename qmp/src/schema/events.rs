//! The events.

use super::macros::event_enum;
use super::types::{JobStatus, ShutdownCause};

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

    /// A job went to another state.
    JobStatusChange {
        /// The job.
        "id" id: String,
        /// Its new state.
        "status" status: JobStatus,
    } = "JOB_STATUS_CHANGE";
}
