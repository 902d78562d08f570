//! Taking the disks back to their checkpoint, all or none.

use block::Occupied;

use super::{Checkpoint, Found, LoadError};
use crate::order::{ChangeError, NodeChange, prepare_all, publish_all, settle_all, show_all};

/// Disks that are ready to go back to their checkpoint.
#[must_use = "the disks go back with `revert`"]
pub struct PreparedDisks<'a> {
    tag: &'a str,
    changes: Vec<NodeChange<'a>>,
    /// No block job begins to copy a disk that is about to be another.
    _alone: Vec<Occupied>,
}

impl<'a> PreparedDisks<'a> {
    /// Takes every disk back, durably, or none. The disks are quiesced meanwhile.
    pub fn revert(mut self) -> Result<(), LoadError> {
        publish_all(&mut self.changes, None)
            .map_err(|source| LoadError::Revert { tag: self.tag.to_owned(), source })
    }

    /// Takes every disk back, or none, in memory: so quickly that a guest can stand still for it. The disks are
    /// quiesced meanwhile.
    pub fn show(mut self) -> Result<ShownDisks<'a>, LoadError> {
        show_all(&mut self.changes)
            .map_err(|source| LoadError::Revert { tag: self.tag.to_owned(), source })?;
        Ok(ShownDisks(self))
    }
}

/// Disks that are those of the checkpoint in memory. Dropping it takes them back to what they were before, so
/// [`ShownDisks::settle`].
#[must_use = "the disks stay with `settle`"]
pub struct ShownDisks<'a>(PreparedDisks<'a>);

impl ShownDisks<'_> {
    /// Makes that durable, and gives back what the disks of before had. The guest may run meanwhile: no flush of
    /// any of the disks returns before all are durably those of the checkpoint.
    ///
    /// # Errors
    /// A disk, the first of which is told, is not durably that of the checkpoint. It will be with its next
    /// flush that succeeds; those of the other disks fail until then.
    pub fn settle(mut self) -> Result<(), LoadError> {
        settle_all(&mut self.0.changes)
            .map_err(|source| LoadError::Revert { tag: self.0.tag.to_owned(), source })
    }
}

impl Checkpoint {
    /// Takes every disk back to the checkpoint, or none. The disks are quiesced meanwhile.
    pub fn revert_disks(&self) -> Result<(), LoadError> {
        self.prepare_disks()?.revert()
    }

    /// Does all that can fail of taking the disks back, so that it is known before the guest is
    /// touched, which may run. The disks stay as they are until [`PreparedDisks::revert`] or
    /// [`PreparedDisks::show`]; dropping it undoes the preparation.
    pub fn prepare_disks(&self) -> Result<PreparedDisks<'_>, LoadError> {
        let mut changes = Vec::with_capacity(self.nodes.len());
        let failed = |source| LoadError::Revert { tag: self.tag.clone(), source };
        let mut alone = Vec::with_capacity(self.nodes.len());
        for Found { node, format, snapshot } in &self.nodes {
            let change = node.occupy_alone("snapshot-load").and_then(|occupied| {
                alone.push(occupied);
                format.revert_snapshot(&snapshot.id)
            });
            match change {
                Ok(change) => changes.push(NodeChange { node: node.name(), change }),
                Err(source) => {
                    let error = ChangeError::at_begin(node.name(), source, &mut changes);
                    return Err(failed(error));
                }
            }
        }
        prepare_all(&mut changes, None).map_err(failed)?;
        Ok(PreparedDisks { tag: &self.tag, changes, _alone: alone })
    }
}
