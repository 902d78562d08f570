//! The checkpoints that a set of nodes holds, as a tree.
//!
//! Nothing is changed and nothing is kept from being changed: a checkpoint that is deleted while it
//! is looked at is left out or told with what could still be read of it.

use std::collections::HashMap;
use std::sync::Arc;

use block::snapshot::SnapshotSizes;
use block::{Node, ReadBuf, SnapshotInfo};

use crate::about::Stamp;
use crate::config::{CONFIG_KIND, CheckpointConfig, MAX_CONFIG, decode_config};
use crate::format::FormatError;
use crate::format::area::StateArea;

/// A checkpoint as the images tell it.
#[derive(Debug)]
pub struct Entry {
    /// Tag, date and clock.
    pub stamp: Stamp,
    /// The snapshot on each node that has it.
    pub places: Vec<Place>,
    /// What it records of machine and ancestry; `None` for one without machine state, or why it
    /// cannot be told.
    pub recorded: Option<Result<CheckpointConfig, FormatError>>,
    /// Its nearest ancestor that is still there, by index in the list.
    pub above: Option<usize>,
}

/// A checkpoint's snapshot on one node.
#[derive(Debug)]
pub struct Place {
    /// The node's name.
    pub node: String,
    /// The snapshot's id in the image.
    pub id: String,
    /// Bytes of the VM-state area; 0 on all nodes but one.
    pub vm_state_size: u64,
    /// What is its own and what it shares.
    pub sizes: Option<SnapshotSizes>,
}

impl Entry {
    /// Where the VM state is.
    pub fn vmstate(&self) -> Option<&Place> {
        self.places.iter().find(|place| place.vm_state_size > 0)
    }

    /// What it records, where that can be told.
    pub fn config(&self) -> Option<&CheckpointConfig> {
        self.recorded.as_ref()?.as_ref().ok()
    }
}

/// Lists the checkpoints on `nodes`, the oldest first. With `sizes` their tables are read.
///
/// # Errors
/// A node cannot tell its sizes. A checkpoint whose record cannot be read is no error.
pub fn list(nodes: &[Arc<Node>], sizes: bool) -> block::Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut of_stamp: HashMap<Stamp, usize> = HashMap::new();
    for node in nodes {
        for snapshot in node.snapshots() {
            let stamp = Stamp::of(&snapshot);
            let Some(place) = look_at(node, &snapshot, sizes)? else { continue };
            let has_node = |at: &usize| entries[*at].places.iter().any(|p| p.node == place.node);
            // A broken table may have one stamp twice.
            match of_stamp.get(&stamp).copied().filter(|at| !has_node(at)) {
                Some(at) => entries[at].places.push(place),
                None => {
                    of_stamp.insert(stamp.clone(), entries.len());
                    entries.push(Entry { stamp, places: vec![place], recorded: None, above: None });
                }
            }
        }
    }
    entries.sort_by_key(|entry| (entry.stamp.date_sec, entry.stamp.date_nsec));
    for entry in &mut entries {
        entry.recorded = entry.vmstate().and_then(|place| {
            let node = nodes.iter().find(|node| node.name() == place.node)?;
            Some(read_config(node, &place.id))
        });
    }
    connect(&mut entries);
    Ok(entries)
}

/// `None` if it has gone meanwhile.
fn look_at(node: &Node, snapshot: &SnapshotInfo, sizes: bool) -> block::Result<Option<Place>> {
    let sizes = match sizes.then(|| node.access().snapshot_sizes(&snapshot.id)).transpose() {
        Ok(sizes) => sizes,
        Err(block::Error::NoSuchSnapshot { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(Place {
        node: node.name().to_owned(),
        id: snapshot.id.clone(),
        vm_state_size: snapshot.vm_state_size,
        sizes,
    }))
}

/// Reads the configuration that a snapshot records, and nothing else of it.
pub fn read_config(node: &Node, id: &str) -> Result<CheckpointConfig, FormatError> {
    let image = node.access();
    let state = image.look_at_vmstate(id).map_err(|source| FormatError::Read {
        what: "the VM state".to_owned(),
        source: Box::new(source),
    })?;
    let section =
        StateArea::read_section(state.size(), CONFIG_KIND, MAX_CONFIG, |offset, buffer| {
            state.read(offset.0, &[ReadBuf::new(buffer)])
        })?;
    decode_config(&[section])
}

/// Finds the nearest ancestor of each that is still there.
fn connect(entries: &mut [Entry]) {
    let places: HashMap<Stamp, usize> =
        (0..).zip(entries.iter()).map(|(at, entry)| (entry.stamp.clone(), at)).collect();
    for (at, entry) in (0..).zip(entries.iter_mut()) {
        let above = entry.config().and_then(|config| {
            let there = config.about.ancestors.iter().filter_map(|stamp| places.get(stamp));
            there.copied().find(|other| *other != at)
        });
        entry.above = above;
    }
}

/// A checkpoint's place in a drawing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which it is.
    pub index: usize,
    /// For each level of branches, whether another branch follows further down; the last is its
    /// own level.
    pub branches: Vec<bool>,
    /// Whether a branch starts here; else it is the only one that follows the row before it.
    pub starts_branch: bool,
    /// Whether nothing is above it.
    pub root: bool,
}

/// Puts checkpoints in an order to be drawn: each below the one it comes from. One that is the only
/// one to follow another continues its line; several make a branch each. `above` is each one's
/// nearest ancestor. Ancestors in a circle, which only a damaged image has, are drawn as roots.
pub fn arrange(above: &[Option<usize>]) -> Vec<Row> {
    let mut below: Vec<Vec<usize>> = vec![Vec::new(); above.len()];
    for (at, parent) in (0..).zip(above) {
        if let Some(list) = parent.and_then(|parent| below.get_mut(parent)) {
            list.push(at);
        }
    }
    let mut rows = Vec::with_capacity(above.len());
    let mut drawn = vec![false; above.len()];
    let roots = (0..above.len()).filter(|at| above[*at].is_none());
    // What is left after the roots are circles.
    for root in roots.chain(0..above.len()) {
        let first = Row { index: root, branches: Vec::new(), starts_branch: false, root: true };
        // A stack, not recursion: a chain may be as long as a table.
        let mut next = vec![first];
        while let Some(row) = next.pop() {
            if std::mem::replace(&mut drawn[row.index], true) {
                continue;
            }
            next.extend(followers(&row, &below[row.index]));
            rows.push(row);
        }
    }
    rows
}

/// The rows that follow one, the last first.
fn followers(row: &Row, below: &[usize]) -> Vec<Row> {
    let one = |&index: &usize, branches: Vec<bool>, starts_branch| Row {
        index,
        branches,
        starts_branch,
        root: false,
    };
    match below {
        [only] => vec![one(only, row.branches.clone(), false)],
        several => {
            let last = several.len().saturating_sub(1);
            let branch = |(at, index): (usize, &usize)| {
                one(index, row.branches.iter().copied().chain([at != last]).collect(), true)
            };
            several.iter().enumerate().map(branch).rev().collect()
        }
    }
}

#[cfg(test)]
mod tests;
