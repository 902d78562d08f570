//! External snapshots, and what images name as their backing files.

use super::macros::{enums, objects};

enums! {
    /// Where a new image comes from.
    NewImageMode {
        /// It is there already.
        Existing = "existing",
        /// It is created, and names its backing file by an absolute path.
        AbsolutePaths = "absolute-paths",
    }
}

objects! {
    /// Arguments of `blockdev-snapshot`.
    BlockdevSnapshot {
        /// The node that gets an overlay.
        "node" node: String,
        /// The overlay: a node without a backing file that nobody uses.
        "overlay" overlay: String,
    }

    /// Arguments of `blockdev-snapshot-sync`.
    BlockdevSnapshotSync {
        /// The device whose node gets an overlay; nodes of `blockdev-add` belong to none.
        "device" device: Option<String>,
        /// The node that gets an overlay.
        "node-name" node_name: Option<String>,
        /// The overlay's file.
        "snapshot-file" snapshot_file: String,
        /// The name of the overlay's node; needed with `node-name`.
        "snapshot-node-name" snapshot_node_name: Option<String>,
        /// The overlay's format; by default `qcow2`.
        "format" format: Option<String>,
        /// Whether the overlay is created, as by default, or there already.
        "mode" mode: Option<NewImageMode>,
    }

    /// Arguments of `change-backing-file`.
    ChangeBackingFileArguments {
        /// The node at the top of the chain.
        "device" device: String,
        /// The node whose image is changed.
        "image-node-name" image_node_name: String,
        /// What the image names as its backing file from now on; nothing if it is empty.
        "backing-file" backing_file: String,
    }
}
