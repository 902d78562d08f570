//! The arguments of commands.

use super::macros::objects;
use super::types::QmpCapability;

objects! {
    /// Arguments of `qmp_capabilities`.
    CapabilitiesArguments {
        /// Capabilities to switch on.
        "enable" enable: Option<Vec<QmpCapability>>,
    }

    /// Arguments of `query-named-block-nodes`.
    NamedNodesArguments {
        /// Leave out the images' `backing-image`, which are listed as nodes anyway.
        "flat" flat: Option<bool>,
    }

    /// Arguments of `snapshot-save` and `snapshot-load`.
    SnapshotArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The checkpoint.
        "tag" tag: String,
        /// The node that holds the machine's state: one of `devices`.
        "vmstate" vmstate: String,
        /// The nodes whose disks are in the checkpoint.
        "devices" devices: Vec<String>,
    }

    /// Arguments of `snapshot-delete`.
    SnapshotDeleteArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The checkpoint.
        "tag" tag: String,
        /// The nodes to delete it from.
        "devices" devices: Vec<String>,
    }

    /// Arguments of the commands about one job.
    JobArguments {
        /// The job.
        "id" id: String,
    }
}
