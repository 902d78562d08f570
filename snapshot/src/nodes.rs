//! Which nodes a checkpoint is taken of, and what is refused before anything is done.
//!
//! The texts are those of QEMU's snapshot jobs where QEMU has one: clients match on them.

use std::sync::Arc;

use block::{Node, SnapshotInfo};

/// Longest tag that a snapshot table keeps, in bytes.
const MAX_TAG: usize = 255;

/// Why a list of nodes cannot carry a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodesError {
    /// The list is empty.
    #[error("At least one device is required for snapshot")]
    Empty,
    /// No node has that name.
    #[error("No block device node '{0}'")]
    Unknown(String),
    /// A node is listed twice.
    #[error("Block device node '{0}' is listed more than once")]
    Repeated(String),
    /// The node is read-only or its format has no internal snapshots.
    #[error("Device '{0}' is writable but does not support snapshots")]
    NoSnapshots(String),
    /// The VM-state node is not one of the nodes.
    #[error("vmstate block device '{0}' does not exist")]
    NoVmState(String),
    /// A block job copies the node, which would have to go back under it.
    #[error("{0}")]
    Busy(String),
}

/// Looks up the nodes of a request by name.
pub fn resolve<S: AsRef<str>>(
    names: &[S],
    lookup: impl Fn(&str) -> Option<Arc<Node>>,
) -> Result<Vec<Arc<Node>>, NodesError> {
    if names.is_empty() {
        return Err(NodesError::Empty);
    }
    let mut nodes: Vec<Arc<Node>> = Vec::with_capacity(names.len());
    for name in names {
        let name = name.as_ref();
        let node = lookup(name).ok_or_else(|| NodesError::Unknown(name.to_owned()))?;
        nodes.push(node);
    }
    no_repeats(&nodes)?;
    Ok(nodes)
}

/// Checks that every node can change its snapshots, and that none is there twice.
pub(crate) fn check_capable(nodes: &[Arc<Node>]) -> Result<(), NodesError> {
    if nodes.is_empty() {
        return Err(NodesError::Empty);
    }
    no_repeats(nodes)?;
    for node in nodes {
        // QEMU says the same of read-only and inactive nodes, and clients look for these words.
        if node.read_only() || node.is_inactive() || !node.format().supports_snapshots() {
            return Err(NodesError::NoSnapshots(node.name().to_owned()));
        }
    }
    Ok(())
}

/// Checks that no job works on any of the nodes, which are to go back.
pub(crate) fn check_no_jobs(nodes: &[Arc<Node>]) -> Result<(), NodesError> {
    nodes
        .iter()
        .try_for_each(|node| node.check_no_job())
        .map_err(|e| NodesError::Busy(e.to_string()))
}

/// The place of the VM-state node in the list.
pub(crate) fn vmstate_index(nodes: &[Arc<Node>], vmstate: &str) -> Result<usize, NodesError> {
    let at = nodes.iter().position(|node| node.name() == vmstate);
    at.ok_or_else(|| NodesError::NoVmState(vmstate.to_owned()))
}

/// The tag as a snapshot table keeps it: cut to 255 bytes, between characters.
pub fn kept_tag(tag: &str) -> &str {
    &tag[..tag.floor_char_boundary(MAX_TAG)]
}

/// The first snapshot of that tag in table order. Ids are never looked at: a tag is a tag.
pub(crate) fn find_tag(node: &Node, tag: &str) -> Option<SnapshotInfo> {
    let tag = kept_tag(tag);
    node.snapshots().into_iter().find(|s| s.tag == tag)
}

fn no_repeats(nodes: &[Arc<Node>]) -> Result<(), NodesError> {
    for (at, node) in nodes.iter().enumerate() {
        if nodes[..at].iter().any(|other| other.name() == node.name()) {
            return Err(NodesError::Repeated(node.name().to_owned()));
        }
    }
    Ok(())
}

/// "'d0', 'd1'"
pub(crate) fn quoted<S: AsRef<str>>(names: &[S]) -> String {
    let quote = |name: &S| format!("'{}'", name.as_ref());
    names.iter().map(quote).collect::<Vec<_>>().join(", ")
}
