//! Deleting a checkpoint from all of its nodes, or from none.

use std::sync::Arc;

use block::{Format, Node, Progress, SnapshotInfo};

use crate::nodes::{NodesError, check_capable, find_tag, kept_tag};
use crate::order::{ChangeError, NodeChange, all_or_none};

/// Where a delete found the tag.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteReport {
    /// The nodes that had it and have it no more.
    pub deleted: Vec<String>,
    /// The nodes that never had it: no error, as in QEMU.
    pub absent: Vec<String>,
}

/// Why a checkpoint was not deleted. It is still on every node, unless the error tells of nodes
/// that could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The nodes cannot carry a checkpoint.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// A node failed.
    #[error("Could not delete snapshot '{tag}' on '{}': {source}", .source.node)]
    Delete {
        /// The tag.
        tag: String,
        /// The node, the step, and why.
        source: ChangeError,
    },
}

impl DeleteError {
    /// Whether it ended because it was no longer wanted.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Delete { source, .. } if source.is_cancelled())
    }
}

/// Deletes the first snapshot of that tag on each node; nodes without one are skipped.
pub fn delete(nodes: &[Arc<Node>], tag: &str) -> Result<DeleteReport, DeleteError> {
    delete_unless(nodes, tag, &Progress::default())
}

/// As [`delete`]; `progress` can cancel it until the first node is changed.
pub fn delete_unless(
    nodes: &[Arc<Node>],
    tag: &str,
    progress: &Progress,
) -> Result<DeleteReport, DeleteError> {
    check_capable(nodes)?;
    let mut report = DeleteReport::default();
    let mut found: Vec<(&Node, Arc<dyn Format>, SnapshotInfo)> = Vec::new();
    for node in nodes {
        let name = node.name().to_owned();
        match find_tag(node, tag) {
            Some(snapshot) => {
                report.deleted.push(name);
                found.push((&**node, node.format(), snapshot));
            }
            None => report.absent.push(name),
        }
    }
    // The VM state goes first, as it came last: a crash in between leaves no tag that seems to be
    // a checkpoint and lacks a disk.
    found.sort_by_key(|(_, _, snapshot)| snapshot.vm_state_size == 0);
    let failed = |source| DeleteError::Delete { tag: kept_tag(tag).to_owned(), source };
    let mut changes = Vec::with_capacity(found.len());
    for (node, format, snapshot) in &found {
        match format.delete_snapshot(&snapshot.id) {
            Ok(change) => changes.push(NodeChange { node: node.name(), change }),
            Err(source) => {
                let error = ChangeError::at_begin(node.name(), source, &mut changes);
                return Err(failed(error));
            }
        }
    }
    all_or_none(&mut changes, Some(progress)).map_err(failed)?;
    Ok(report)
}
