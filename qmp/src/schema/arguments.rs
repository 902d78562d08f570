//! The arguments of commands.

use serde_json::Value;

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

    /// Arguments of the commands about one dirty bitmap.
    BitmapArguments {
        /// The node.
        "node" node: String,
        /// The bitmap.
        "name" name: String,
    }

    /// Arguments of `block-dirty-bitmap-add`.
    BitmapAddArguments {
        /// The node.
        "node" node: String,
        /// The bitmap's name.
        "name" name: String,
        /// Bytes that one bit stands for; the cluster size, within 4 KiB and 64 KiB, without it.
        "granularity" granularity: Option<i64>,
        /// Store it in the image when that is closed.
        "persistent" persistent: Option<bool>,
        /// Do not note writes yet.
        "disabled" disabled: Option<bool>,
    }

    /// Arguments of `block-dirty-bitmap-merge`.
    BitmapMergeArguments {
        /// The node of the target.
        "node" node: String,
        /// The bitmap that is added to.
        "target" target: String,
        /// The sources: each a bitmap's name on the same node, or an object of `node` and `name`.
        "bitmaps" bitmaps: Vec<Value>,
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
