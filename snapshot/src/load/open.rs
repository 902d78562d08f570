//! Finding a checkpoint on its nodes and checking that it is whole.

use std::sync::{Arc, OnceLock};

use block::{Node, ReadBuf, SnapshotInfo};

use super::{Checkpoint, Found, LoadError};
use crate::config::{CheckpointConfig, decode_config};
use crate::format::FormatError;
use crate::format::area::StateArea;
use crate::nodes::{check_capable, check_no_jobs, find_tag, kept_tag, vmstate_index};
use crate::units::human;

impl Checkpoint {
    /// Finds the checkpoint `tag` on all of `nodes`, with its VM state on the one named `vmstate`,
    /// and verifies header and sections.
    pub fn open(nodes: &[Arc<Node>], vmstate: &str, tag: &str) -> Result<Self, LoadError> {
        check_capable(nodes)?;
        check_no_jobs(nodes)?;
        let tag = kept_tag(tag).to_owned();
        let found = find(nodes, &tag)?;
        let vmstate = vmstate_index(nodes, vmstate)?;
        let (area, config) = found[vmstate].read(&tag)?;
        let nodes = same_save(found, vmstate, &tag)?;
        let stored = OnceLock::new();
        let checkpoint = Self { nodes, vmstate, tag, area, config, stored };
        checkpoint.check_disks()?;
        Ok(checkpoint)
    }

    /// Opens the checkpoint `tag` on the node with its VM state alone, which may be read-only: RAM and
    /// state can be had from it, the disks cannot go back.
    pub fn open_state(node: &Arc<Node>, tag: &str) -> Result<Self, LoadError> {
        let tag = kept_tag(tag).to_owned();
        let found = find(std::slice::from_ref(node), &tag)?;
        let (area, config) = found[0].read(&tag)?;
        Ok(Self { nodes: found, vmstate: 0, tag, area, config, stored: OnceLock::new() })
    }

    /// Every node of the checkpoint is there with a snapshot of its size, and no other. Which size it
    /// has now is of no account: it goes back to that one.
    fn check_disks(&self) -> Result<(), LoadError> {
        let mut reasons = Vec::new();
        for saved in &self.config.nodes {
            let here = self.nodes.iter().find(|n| n.node.name() == saved.node);
            match here.map(|found| found.snapshot.disk_size) {
                None => reasons.push(format!("'{}' belongs to it and is not given", saved.node)),
                Some(size) if size != saved.size => reasons.push(format!(
                    "'{}' has a snapshot of {}, in the checkpoint {}",
                    saved.node,
                    human(size),
                    human(saved.size)
                )),
                Some(_) => (),
            }
        }
        for Found { node, .. } in &self.nodes {
            if !self.config.nodes.iter().any(|saved| saved.node == node.name()) {
                reasons.push(format!("'{}' does not belong to it", node.name()));
            }
        }
        if reasons.is_empty() {
            return Ok(());
        }
        Err(LoadError::Disks { tag: self.tag.clone(), reasons })
    }
}

/// Every node with its first snapshot of the tag.
fn find(nodes: &[Arc<Node>], tag: &str) -> Result<Vec<Found>, LoadError> {
    let mut found = Vec::with_capacity(nodes.len());
    let mut lacking = Vec::new();
    for node in nodes {
        match find_tag(node, tag) {
            Some(snapshot) => {
                found.push(Found { node: node.clone(), format: node.format(), snapshot });
            }
            None => lacking.push(node.name().to_owned()),
        }
    }
    if lacking.is_empty() {
        return Ok(found);
    }
    Err(LoadError::NotFound { tag: tag.to_owned(), nodes: lacking })
}

/// One save stamps all nodes with one date and one clock. Where a table has the tag more than once,
/// the snapshot with that stamp is the one meant.
fn same_save(mut found: Vec<Found>, vmstate: usize, tag: &str) -> Result<Vec<Found>, LoadError> {
    let stamp = |s: &SnapshotInfo| (s.date_sec, s.date_nsec, s.vm_clock_nsec);
    let wanted = stamp(&found[vmstate].snapshot);
    let carrier = found[vmstate].node.name().to_owned();
    for Found { node, format, snapshot } in &mut found {
        if stamp(snapshot) == wanted {
            continue;
        }
        let snapshots = format.snapshots();
        let same = |s: &SnapshotInfo| s.tag == tag && stamp(s) == wanted;
        *snapshot = snapshots.into_iter().find(same).ok_or_else(|| LoadError::NotTogether {
            tag: tag.to_owned(),
            node: node.name().to_owned(),
            vmstate: carrier.clone(),
        })?;
    }
    Ok(found)
}

impl Found {
    /// The VM state, verified, and the configuration in it.
    fn read(&self, tag: &str) -> Result<(StateArea, CheckpointConfig), LoadError> {
        let Self { node, snapshot, .. } = self;
        if snapshot.vm_state_size == 0 {
            return Err(LoadError::DiskOnly);
        }
        let unusable =
            |source| LoadError::State { tag: tag.to_owned(), node: node.name().to_owned(), source };
        let area = read_area(node, snapshot).map_err(unusable)?;
        let config = decode_config(&area.sections).map_err(unusable)?;
        Ok((area, config))
    }
}

fn read_area(node: &Node, snapshot: &SnapshotInfo) -> Result<StateArea, FormatError> {
    let format = node.format();
    let vmstate = format.open_vmstate(&snapshot.id).map_err(unreadable("the VM state"))?;
    StateArea::read(vmstate.size(), |offset, buffer| {
        vmstate.read(offset.0, &[ReadBuf::new(buffer)])
    })
}

pub(super) fn unreadable(what: &str) -> impl FnOnce(block::Error) -> FormatError {
    let what = what.to_owned();
    move |source| FormatError::Read { what, source: Box::new(source) }
}
