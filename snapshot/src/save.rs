//! Saving: RAM and machine state into the VM-state area, a snapshot of every disk, all or nothing.

use std::sync::Arc;

use block::{Format, NewSnapshot, Node, Progress, SnapshotCreate, WriteBuf};

use crate::GuestMemory;
use crate::about::{About, AboutError, Stamp};
use crate::capture::capture;
use crate::config::{CONFIG_KIND, CONFIG_VERSION, CheckpointConfig, CheckpointNode, MachineConfig};
use crate::format::FormatError;
use crate::format::area::StateArea;
use crate::format::section::Section;
use crate::memory;
use crate::nodes::{NodesError, check_capable, find_tag, kept_tag, quoted, vmstate_index};
use crate::order::{ChangeError, NodeChange, all_or_none};

/// A checkpoint to be saved. The vCPUs are stopped and the disks quiesced while it is.
pub struct SaveRequest<'a> {
    /// The nodes whose disks belong to the checkpoint.
    pub nodes: &'a [Arc<Node>],
    /// Name of the one that carries the VM state.
    pub vmstate: &'a str,
    /// Tag and times.
    pub stamp: Stamp,
    /// What is recorded besides the machine.
    pub about: About,
    /// The machine; becomes the configuration section, together with the nodes.
    pub config: &'a MachineConfig,
    /// All other sections.
    pub sections: Vec<Section>,
    /// Guest RAM, of which nothing is missing: see [`crate::LazyRam::complete`].
    pub ram: &'a GuestMemory,
    /// Tells bytes of RAM done, and cancels until the first snapshot is published.
    pub progress: &'a Progress,
    /// How many threads write RAM.
    pub threads: usize,
}

/// What a save did, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveReport {
    /// Guest RAM.
    pub ram_bytes: u64,
    /// RAM written to the image.
    pub stored_bytes: u64,
    /// RAM that is zero and takes no space in the image.
    pub zero_bytes: u64,
    /// Header and sections.
    pub state_bytes: u64,
    /// RAM, header and sections written.
    pub bytes_written: u64,
    /// Length of the VM-state area in the snapshot table, holes counted.
    pub vm_state_size: u64,
}

/// Why a checkpoint was not saved. Every node is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The nodes cannot carry a checkpoint.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// A node has a snapshot of that tag.
    #[error("Snapshot '{tag}' already exists in one or more devices: {}", quoted(.nodes))]
    Exists {
        /// The tag.
        tag: String,
        /// The nodes that have it.
        nodes: Vec<String>,
    },
    /// The tag cannot be kept in a snapshot table.
    #[error("Snapshot tag '{}' contains a NUL character", .0.escape_debug())]
    BadTag(String),
    /// A description or label cannot be kept.
    #[error("Snapshot '{tag}': {source}")]
    About {
        /// The tag.
        tag: String,
        /// Which, and why not.
        source: AboutError,
    },
    /// The machine's state cannot be stored.
    #[error("Error while writing VM state: {0}")]
    State(#[from] FormatError),
    /// RAM or state could not be written.
    #[error("Error while writing VM state to '{}': {source}", .source.node)]
    Write {
        /// The VM-state node, and why.
        source: ChangeError,
    },
    /// A snapshot could not be created.
    #[error("Could not create snapshot '{tag}' on '{}': {source}", .source.node)]
    Create {
        /// The tag.
        tag: String,
        /// The node, the step, and why.
        source: ChangeError,
    },
    /// The save was cancelled.
    #[error("Operation canceled")]
    Cancelled,
}

/// Checks all that can be known before the guest is stopped.
pub fn preflight_save(nodes: &[Arc<Node>], vmstate: &str, tag: &str) -> Result<(), SaveError> {
    check_capable(nodes)?;
    let has = |node: &&Arc<Node>| find_tag(node, tag).is_some();
    let with: Vec<_> = nodes.iter().filter(has).collect();
    if !with.is_empty() {
        return Err(SaveError::Exists {
            tag: kept_tag(tag).to_owned(),
            nodes: with.iter().map(|node| node.name().to_owned()).collect(),
        });
    }
    vmstate_index(nodes, vmstate)?;
    // C programs that read the table would see another tag.
    if tag.contains('\0') {
        return Err(SaveError::BadTag(tag.to_owned()));
    }
    Ok(())
}

/// Saves a checkpoint: on return it is durable on all nodes, or every node is as it was.
pub fn save(request: SaveRequest<'_>) -> Result<SaveReport, SaveError> {
    let SaveRequest { nodes, vmstate, stamp, about, config, sections, ram, progress, threads } =
        request;
    preflight_save(nodes, vmstate, &stamp.tag)?;
    let unkept = |source| SaveError::About { tag: stamp.tag.clone(), source };
    about.check().map_err(unkept)?;
    let about = About { vmstate: vmstate.to_owned(), ..about };
    let area = state_area(nodes, config, about, sections, ram)?;
    let tag = kept_tag(&stamp.tag);
    let new = NewSnapshot {
        tag: tag.to_owned(),
        date_sec: stamp.date_sec,
        date_nsec: stamp.date_nsec,
        vm_clock_nsec: stamp.vm_clock_nsec,
    };
    progress.add_total(area.layout.ram_bytes());

    let images = in_order(nodes, vmstate);
    let mut creates = begin(&images, &new)?;
    let carrier = creates.last_mut();
    let written = carrier.map(|Begun { change, .. }| {
        let result = write_state(change.as_mut(), &area, ram, threads, progress);
        progress.check().and(result)
    });
    let mut changes: Vec<_> = creates.into_iter().map(Begun::into_change).collect();
    match written {
        Some(Ok(report)) => {
            all_or_none(&mut changes, Some(progress)).map_err(|error| failed(tag, error))?;
            Ok(report)
        }
        Some(Err(source)) => {
            let error = ChangeError::at_begin(vmstate, source, &mut changes);
            Err(if error.is_cancelled() {
                SaveError::Cancelled
            } else {
                SaveError::Write { source: error }
            })
        }
        None => Err(NodesError::Empty.into()),
    }
}

/// A snapshot begun on one node.
struct Begun<'a> {
    node: &'a str,
    change: Box<dyn SnapshotCreate + 'a>,
}

impl<'a> Begun<'a> {
    fn into_change(self) -> NodeChange<'a> {
        NodeChange { node: self.node, change: self.change }
    }
}

/// Every node with its image, the VM-state node last: see [`crate::order`].
fn in_order<'a>(nodes: &'a [Arc<Node>], vmstate: &str) -> Vec<(&'a Node, Arc<dyn Format>)> {
    let (carrier, others): (Vec<_>, Vec<_>) = nodes.iter().partition(|n| n.name() == vmstate);
    others.into_iter().chain(carrier).map(|node| (&**node, node.format())).collect()
}

/// Begins the snapshot on every image in turn.
fn begin<'a>(
    images: &'a [(&'a Node, Arc<dyn Format>)],
    new: &NewSnapshot,
) -> Result<Vec<Begun<'a>>, SaveError> {
    let mut begun: Vec<Begun<'_>> = Vec::with_capacity(images.len());
    for (node, format) in images {
        match format.create_snapshot(new) {
            Ok(change) => begun.push(Begun { node: node.name(), change }),
            Err(source) => {
                let mut changes: Vec<_> = begun.into_iter().map(Begun::into_change).collect();
                let error = ChangeError::at_begin(node.name(), source, &mut changes);
                return Err(failed(&new.tag, error));
            }
        }
    }
    Ok(begun)
}

/// Fills the VM-state area: RAM, then what comes before it.
fn write_state(
    target: &mut dyn SnapshotCreate,
    area: &StateArea,
    ram: &GuestMemory,
    threads: usize,
    progress: &Progress,
) -> block::Result<SaveReport> {
    let slices = memory::slices(ram);
    let captured = capture(&*target, &slices, &area.layout, threads, progress)?;
    let state = area.encode_padded(target.cluster_size());
    target.write_vmstate(0, &[WriteBuf::new(&state)])?;
    target.set_vmstate_size(area.layout.total_length());
    let state_bytes = state.len() as u64;
    Ok(SaveReport {
        ram_bytes: area.layout.ram_bytes(),
        stored_bytes: captured.stored,
        zero_bytes: captured.zero,
        state_bytes,
        bytes_written: captured.stored + state_bytes,
        vm_state_size: area.layout.total_length(),
    })
}

fn failed(tag: &str, source: ChangeError) -> SaveError {
    if source.is_cancelled() {
        return SaveError::Cancelled;
    }
    let tag = tag.to_owned();
    SaveError::Create { tag, source }
}

/// The configuration section followed by the machine's own.
fn state_area(
    nodes: &[Arc<Node>],
    config: &MachineConfig,
    about: About,
    sections: Vec<Section>,
    ram: &GuestMemory,
) -> Result<StateArea, FormatError> {
    let node =
        |node: &Arc<Node>| CheckpointNode { node: node.name().to_owned(), size: node.size() };
    let nodes = nodes.iter().map(node).collect();
    let config = CheckpointConfig { machine: config.clone(), nodes, about };
    let mut all = vec![Section::encode(CONFIG_KIND, 0, CONFIG_VERSION, &config)?];
    all.extend(sections);
    StateArea::new(&memory::ranges(ram), all)
}
