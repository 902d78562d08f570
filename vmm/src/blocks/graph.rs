//! blockdev-snapshot, blockdev-snapshot-sync and change-backing-file.

use block::Graph;
use block::graph::{ExternalSnapshot, Overlay};
use qmp::schema::{
    BlockdevSnapshot, BlockdevSnapshotSync, ChangeBackingFileArguments, NewImageMode,
};

use super::{Blocks, failed, text};

impl Blocks {
    /// blockdev-snapshot.
    pub(super) fn snapshot(&self, arguments: &BlockdevSnapshot) -> Result<(), qmp::Error> {
        take(prepare_snapshot(&self.graph, arguments)?)
    }

    /// blockdev-snapshot-sync.
    pub(super) fn snapshot_sync(&self, arguments: &BlockdevSnapshotSync) -> Result<(), qmp::Error> {
        take(prepare_snapshot_sync(&self.graph, arguments)?)
    }

    /// change-backing-file.
    pub(super) fn change_backing_file(
        &self,
        arguments: &ChangeBackingFileArguments,
    ) -> Result<(), qmp::Error> {
        let ChangeBackingFileArguments { device, image_node_name, backing_file } = arguments;
        self.graph.change_backing_file(device, image_node_name, backing_file).map_err(failed)
    }
}

fn take(mut snapshot: ExternalSnapshot) -> Result<(), qmp::Error> {
    snapshot.commit().map_err(failed)?;
    snapshot.finish();
    Ok(())
}

/// The first step of blockdev-snapshot.
///
/// # Errors
/// With QEMU's texts; nothing changed then.
pub fn prepare_snapshot(
    graph: &Graph,
    arguments: &BlockdevSnapshot,
) -> Result<ExternalSnapshot, qmp::Error> {
    let overlay = Overlay::Node(arguments.overlay.clone());
    ExternalSnapshot::prepare(graph, &arguments.node, &overlay).map_err(failed)
}

/// The first step of blockdev-snapshot-sync.
///
/// # Errors
/// With QEMU's texts; nothing changed then.
pub fn prepare_snapshot_sync(
    graph: &Graph,
    arguments: &BlockdevSnapshotSync,
) -> Result<ExternalSnapshot, qmp::Error> {
    // Backends have no names here, so `device` is never found, as in QEMU for such nodes.
    let device = arguments.device.as_deref().unwrap_or_default();
    let node = arguments.node_name.as_deref().unwrap_or_default();
    if graph.get(node).is_none() {
        return Err(text(format!("Cannot find device='{device}' nor node-name='{node}'")));
    }
    graph.check_unclaimed(node).map_err(failed)?;
    if arguments.snapshot_node_name.is_none() {
        return Err(text("New overlay node-name missing"));
    }
    let overlay = Overlay::File {
        filename: arguments.snapshot_file.clone(),
        node_name: arguments.snapshot_node_name.clone(),
        format: arguments.format.clone(),
        existing: arguments.mode == Some(NewImageMode::Existing),
    };
    ExternalSnapshot::prepare(graph, node, &overlay).map_err(failed)
}
