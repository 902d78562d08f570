//! Saving: RAM and machine state into the VM-state area, a snapshot of every disk, all or nothing.

use std::sync::Arc;

use block::qcow2::Compression;
use block::{Node, Progress};

use crate::about::{About, AboutError, Stamp};
use crate::config::{CheckpointConfig, CheckpointNode, MachineConfig, encode_config};
use crate::format::FormatError;
use crate::format::area::StateArea;
use crate::format::section::Section;
use crate::nodes::{NodesError, check_capable, find_tag, kept_tag, quoted, vmstate_index};
use crate::order::ChangeError;
use crate::track::PageSet;
use crate::{GuestMemory, memory};

mod aside;
mod steps;
mod writer;

pub use aside::{Aside, Room};
pub use steps::{Machine, Save, SaveImages, SaveSetup, Saved, set_aside};

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
    /// How VM state is compressed, if it is to be.
    pub compress: Option<Compression>,
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
    /// RAM written to the image, before compression; what was written again counts again.
    pub stored_bytes: u64,
    /// RAM that was found to be zero and takes no space in the image.
    pub zero_bytes: u64,
    /// Header and sections.
    pub state_bytes: u64,
    /// RAM, header and sections written, after compression.
    pub bytes_written: u64,
    /// Length of the VM-state area in the snapshot table, holes counted.
    pub vm_state_size: u64,
    /// Whether the rest of RAM is shared with an earlier checkpoint.
    pub incremental: bool,
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
    /// VM state cannot be compressed in that way.
    #[error("VM state on '{}' cannot be compressed: {source}", .source.node)]
    Compression {
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

/// Saves a checkpoint, all of RAM, while the guest stands still: on return it is durable on all nodes,
/// or every node is as it was. [`Save`] does it in steps.
pub fn save(request: SaveRequest<'_>) -> Result<SaveReport, SaveError> {
    let SaveRequest {
        nodes,
        vmstate,
        stamp,
        about,
        compress,
        config,
        sections,
        ram,
        progress,
        threads,
    } = request;
    preflight_save(nodes, vmstate, &stamp.tag)?;
    let unkept = |source| SaveError::About { tag: stamp.tag.clone(), source };
    about.check().map_err(unkept)?;
    let about = About { vmstate: vmstate.to_owned(), ..about };
    let all = all_sections(nodes, config, about.clone(), sections.clone())?;
    let area = StateArea::new(&memory::ranges(ram), all)?;
    let images = SaveImages::of(nodes, vmstate);
    let mut save = Save::begin(
        &images,
        SaveSetup {
            nodes,
            vmstate,
            stamp: &stamp,
            base: None,
            compress,
            absent: false,
            state_bytes: area.layout.start().0,
            ram,
            progress,
            threads,
        },
    )?;
    let mut all = PageSet::of(ram);
    all.insert_all();
    save.write(&all)?;
    let Saved { report, .. } =
        save.finish(Machine { config, about, sections, stamp: stamp.clone() })?;
    Ok(report)
}

/// The configuration section followed by the machine's own.
fn all_sections(
    nodes: &[Arc<Node>],
    config: &MachineConfig,
    about: About,
    sections: Vec<Section>,
) -> Result<Vec<Section>, FormatError> {
    let node =
        |node: &Arc<Node>| CheckpointNode { node: node.name().to_owned(), size: node.size() };
    let nodes = nodes.iter().map(node).collect();
    let config = CheckpointConfig { machine: config.clone(), nodes, about };
    let mut all = vec![encode_config(&config)?];
    all.extend(sections);
    Ok(all)
}
