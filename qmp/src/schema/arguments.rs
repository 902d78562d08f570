//! The arguments of commands.

use super::macros::objects;
use super::types::{
    BlockExportRemoveMode, BlockExportType, LoadMode, QmpCapability, SocketAddress,
};
use super::{BlockDirtyBitmapOrStr, BlockdevOptionsRef};

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
        "bitmaps" bitmaps: Vec<BlockDirtyBitmapOrStr>,
    }

    /// Arguments of `snapshot-load`.
    SnapshotLoadArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The checkpoint.
        "tag" tag: String,
        /// The node that holds the machine's state: one of `devices`.
        "vmstate" vmstate: String,
        /// The nodes whose disks are in the checkpoint.
        "devices" devices: Vec<String>,
        /// When RAM is read; lazy if absent.
        "x-mode" mode: Option<LoadMode>,
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

    /// Arguments of `nbd-server-start`.
    NbdServerArguments {
        /// Where it listens.
        "addr" addr: SocketAddress,
        /// Seconds that a handshake may take; 0 is no limit. Default 10.
        "handshake-max-seconds" handshake_max_seconds: Option<i64>,
        /// Credentials for TLS; refused, there is none.
        "tls-creds" tls_creds: Option<String>,
        /// Authorization of TLS clients; refused.
        "tls-authz" tls_authz: Option<String>,
        /// Clients at the same time; 0 is no limit. Default 100.
        "max-connections" max_connections: Option<i64>,
    }

    /// Arguments of `block-export-add`: a flat union by `type`, of which there is one.
    BlockExportOptions {
        /// The protocol.
        "type" kind: BlockExportType,
        /// The export's id.
        "id" id: String,
        /// Whether the export stays with its thread; refused where it asks for anything.
        "fixed-iothread" fixed_iothread: Option<bool>,
        /// The thread it is to run on; refused.
        "iothread" iothread: Option<String>,
        /// The node.
        "node-name" node_name: String,
        /// Whether clients may write.
        "writable" writable: Option<bool>,
        /// Whether each write is durable when it is answered; refused where it is on.
        "writethrough" writethrough: Option<bool>,
        /// The name clients ask for; default the node's.
        "name" name: Option<String>,
        /// A text for people.
        "description" description: Option<String>,
        /// Dirty bitmaps that clients may ask for.
        "bitmaps" bitmaps: Option<Vec<BlockDirtyBitmapOrStr>>,
        /// Whether clients may ask how deep in the chain a range is.
        "allocation-depth" allocation_depth: Option<bool>,
    }

    /// Arguments of `block-export-del`.
    BlockExportDelArguments {
        /// The export.
        "id" id: String,
        /// What becomes of its clients; default "safe".
        "mode" mode: Option<BlockExportRemoveMode>,
    }
}
