//! Why a load fails.

use crate::config::Difference;
use crate::format::FormatError;
use crate::nodes::{NodesError, quoted};
use crate::order::ChangeError;

/// Why a checkpoint cannot be loaded. Where nothing else is said, nothing was touched.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The nodes cannot carry a checkpoint.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// A node has no snapshot of that tag.
    #[error("Snapshot '{tag}' does not exist in one or more devices: {}", quoted(.nodes))]
    NotFound {
        /// The tag.
        tag: String,
        /// The nodes that lack it.
        nodes: Vec<String>,
    },
    /// The snapshot has no VM state.
    #[error("This is a disk-only snapshot. Revert to it  offline using qemu-img")]
    DiskOnly,
    /// The snapshots of that tag were not made by one save.
    #[error(
        "Snapshot '{tag}' on '{node}' was not taken together with the one on '{vmstate}': their times differ"
    )]
    NotTogether {
        /// The tag.
        tag: String,
        /// The node.
        node: String,
        /// The VM-state node.
        vmstate: String,
    },
    /// The VM state cannot be used.
    #[error("Snapshot '{tag}' on '{node}': {source}")]
    State {
        /// The tag.
        tag: String,
        /// The VM-state node.
        node: String,
        /// Why not.
        source: FormatError,
    },
    /// The disks given are not those of the checkpoint.
    #[error("Snapshot '{tag}' is of other disks: {}", .reasons.join("; "))]
    Disks {
        /// The tag.
        tag: String,
        /// Each disk that is missing, extra or of another size.
        reasons: Vec<String>,
    },
    /// The machine is not like the saved one.
    #[error("Snapshot '{tag}' is of another configuration: {}", texts(.differences))]
    Configuration {
        /// The tag.
        tag: String,
        /// What differs; only what stands in the way.
        differences: Vec<Difference>,
    },
    /// RAM could not be read. Guest memory is in part that of the checkpoint, unless it was fresh;
    /// the disks are untouched.
    #[error("RAM of snapshot '{tag}' could not be read from '{node}': {source}")]
    Ram {
        /// The tag.
        tag: String,
        /// The VM-state node.
        node: String,
        /// What the image said.
        source: block::Error,
    },
    /// A disk could not go back to its snapshot. Every disk is as it was, guest memory is that of
    /// the checkpoint.
    #[error("Could not load snapshot '{tag}' on '{}': {source}", .source.node)]
    Revert {
        /// The tag.
        tag: String,
        /// The node, the step, and why.
        source: ChangeError,
    },
    /// The load was cancelled while RAM was read; as [`LoadError::Ram`].
    #[error("Operation canceled")]
    Cancelled,
}

fn texts(differences: &[Difference]) -> String {
    let texts: Vec<_> = differences.iter().map(Difference::to_string).collect();
    texts.join("; ")
}
