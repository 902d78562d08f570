//! What is told of checkpoints: over QMP, and to people, of a machine that runs and of images that
//! nobody uses. Both come as QMP's `CheckpointInfo`, so both are drawn alike.

pub mod draw;
mod machine;
pub mod show;
pub(crate) mod text;

use std::sync::{Arc, Mutex, PoisonError};

use block::Node;
use block::snapshot::Share;
use qmp::schema::{
    CheckpointInfo, CheckpointLabel, CheckpointPlace, CheckpointRef, CheckpointShare,
};
use snapshot::tree::{self, Entry, Place};
use snapshot::{Lineage, Stamp};

/// Where the machine's guest comes from. Jobs set it when they have succeeded; it is looked at from
/// other threads. A reset does not change it: the disks still are that checkpoint's descendants.
#[derive(Debug, Default)]
pub struct CurrentLineage(Mutex<Lineage>);

impl CurrentLineage {
    /// The checkpoint that the guest was saved to or loaded from last, and those before it.
    pub fn get(&self) -> Lineage {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The guest has been saved to, or loaded from, another.
    pub fn set(&self, lineage: Lineage) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = lineage;
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query<'a> {
    /// Only the checkpoints of this tag, and with their machines.
    pub tag: Option<&'a str>,
    /// Whether to count clusters.
    pub sizes: bool,
}

/// Lists the checkpoints on `nodes`, the oldest first; `lineage` is where the machine comes from that
/// has them.
///
/// # Errors
/// A node's tables cannot be read.
pub fn query(
    nodes: &[Arc<Node>],
    lineage: &Lineage,
    query: Query<'_>,
) -> block::Result<Vec<CheckpointInfo>> {
    let entries = tree::list(nodes, query.sizes)?;
    let current =
        lineage.stamps().iter().find_map(|stamp| entries.iter().find(|e| e.stamp == *stamp));
    let current = current.map(|entry| &entry.stamp);
    let tag = query.tag.map(snapshot::kept_tag);
    let wanted = |entry: &&Entry| tag.is_none_or(|tag| entry.stamp.tag == tag);
    let info = |entry: &Entry| {
        let mut info = describe(entry, current == Some(&entry.stamp));
        info.nearest = entry.above.and_then(|at| entries.get(at)).map(|e| reference(&e.stamp));
        if query.tag.is_some() {
            info.machine = entry.config().map(machine::describe);
        }
        info
    };
    Ok(entries.iter().filter(wanted).map(info).collect())
}

fn describe(entry: &Entry, current: bool) -> CheckpointInfo {
    let about = entry.config().map(|config| config.about.clone()).unwrap_or_default();
    let label = |(key, value)| CheckpointLabel { key, value };
    let vmstate = entry.vmstate();
    CheckpointInfo {
        checkpoint: reference(&entry.stamp),
        places: entry.places.iter().map(place).collect(),
        vmstate: vmstate.map(|place| place.node.clone()),
        vm_state_size: vmstate.map_or(0, |place| place.vm_state_size),
        parent: about.ancestors.first().map(reference),
        nearest: None,
        current,
        description: about.description,
        labels: about.labels.into_iter().map(label).collect(),
        problem: match &entry.recorded {
            Some(Err(error)) => Some(error.to_string()),
            Some(Ok(_)) | None => None,
        },
        machine: None,
    }
}

fn place(place: &Place) -> CheckpointPlace {
    let share = |share: Share| CheckpointShare { alone: share.alone, shared: share.shared };
    CheckpointPlace {
        node_name: place.node.clone(),
        id: place.id.clone(),
        disk: place.sizes.map(|sizes| share(sizes.disk)),
        vm_state: place.sizes.map(|sizes| share(sizes.vm_state)),
    }
}

fn reference(stamp: &Stamp) -> CheckpointRef {
    const SECOND: u64 = 1_000_000_000;
    // At most 2^64 / 10^9.
    let seconds = i64::try_from(stamp.vm_clock_nsec / SECOND).unwrap_or(i64::MAX);
    let rest = i64::try_from(stamp.vm_clock_nsec % SECOND).unwrap_or(0);
    CheckpointRef {
        tag: stamp.tag.clone(),
        date_sec: stamp.date_sec.into(),
        date_nsec: stamp.date_nsec.into(),
        vm_clock_sec: seconds,
        vm_clock_nsec: rest,
    }
}
