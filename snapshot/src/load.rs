//! Loading: everything is checked when a checkpoint is opened; only then is anything touched.

use std::sync::{Arc, OnceLock};

use block::snapshot::VmStateRead;
use block::{Format, Node, Occupied, Progress, ReadBuf, SnapshotInfo};

use crate::GuestMemory;
use crate::about::{Lineage, Stamp};
use crate::config::{CONFIG_KIND, CheckpointConfig, Difference, MachineConfig, decode_config};
use crate::fault::{LazyHost, LazyRam, Notify, Orders, Source};
use crate::format::FormatError;
use crate::format::area::StateArea;
use crate::format::ram::RamLayout;
use crate::format::section::{Section, SectionReader};
use crate::memory;
use crate::nodes::{
    NodesError, check_capable, check_no_jobs, find_tag, kept_tag, quoted, vmstate_index,
};
use crate::order::{ChangeError, NodeChange, prepare_all, publish_all, settle_all, show_all};
pub use crate::revive::ReviveReport;
use crate::revive::{Stored, revive, stored_parts};
use crate::track::Base;
use crate::units::human;

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

/// A checkpoint found whole: its header and sections are checked, and with
/// [`Checkpoint::check_machine`] the mapping of RAM; nothing is touched.
pub struct Checkpoint {
    nodes: Vec<Found>,
    vmstate: usize,
    tag: String,
    area: StateArea,
    config: CheckpointConfig,
    /// Known when RAM was compared with the machine's: an image can claim any.
    stored: OnceLock<Vec<Stored>>,
}

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

/// A node, its image and the snapshot of the tag there. Whoever holds the image keeps a reopen from
/// replacing it.
struct Found {
    node: Arc<Node>,
    format: Arc<dyn Format>,
    snapshot: SnapshotInfo,
}

impl Checkpoint {
    /// Finds the checkpoint `tag` on all of `nodes`, with its VM state on the one named `vmstate`,
    /// and verifies header and sections.
    pub fn open(nodes: &[Arc<Node>], vmstate: &str, tag: &str) -> Result<Self, LoadError> {
        check_capable(nodes)?;
        check_no_jobs(nodes)?;
        let tag = kept_tag(tag).to_owned();
        let found = find(nodes, &tag)?;
        let vmstate = vmstate_index(nodes, vmstate)?;
        let Found { node, snapshot, .. } = &found[vmstate];
        if snapshot.vm_state_size == 0 {
            return Err(LoadError::DiskOnly);
        }
        let unusable =
            |source| LoadError::State { tag: tag.clone(), node: node.name().to_owned(), source };
        let area = read_area(node, snapshot).map_err(unusable)?;
        let config = decode_config(&area.sections).map_err(unusable)?;
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
        let Found { snapshot, .. } = &found[0];
        if snapshot.vm_state_size == 0 {
            return Err(LoadError::DiskOnly);
        }
        let unusable =
            |source| LoadError::State { tag: tag.clone(), node: node.name().to_owned(), source };
        let area = read_area(node, snapshot).map_err(unusable)?;
        let config = decode_config(&area.sections).map_err(unusable)?;
        Ok(Self { nodes: found, vmstate: 0, tag, area, config, stored: OnceLock::new() })
    }

    /// The machine that was saved, and the nodes of the checkpoint.
    pub fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// What the snapshot table of the VM-state node tells: date, clock, sizes.
    pub fn info(&self) -> &SnapshotInfo {
        &self.nodes[self.vmstate].snapshot
    }

    /// What RAM is when it has been read.
    pub fn base(&self) -> Base {
        let Found { node, snapshot, .. } = self.carrier();
        Base {
            node: node.name().to_owned(),
            snapshot: snapshot.clone(),
            ram_offset: self.area.layout.start().0,
        }
    }

    /// Each node with its image and its snapshot, in the order they were given.
    pub(crate) fn parts(
        &self,
    ) -> impl Iterator<Item = (&Arc<Node>, &Arc<dyn Format>, &SnapshotInfo)> {
        self.nodes.iter().map(|found| (&found.node, &found.format, &found.snapshot))
    }

    /// Which of them holds the VM state.
    pub(crate) fn vmstate_at(&self) -> usize {
        self.vmstate
    }

    /// Name of the node that holds the VM state.
    pub fn vmstate_node(&self) -> &str {
        self.carrier().node.name()
    }

    /// Where a guest comes from that was loaded from it.
    pub fn lineage(&self) -> Lineage {
        Lineage::at(Stamp::of(self.info()), &self.config.about.ancestors)
    }

    /// Where RAM lies.
    pub fn layout(&self) -> &RamLayout {
        &self.area.layout
    }

    /// The section of `kind` and `instance`.
    pub fn section(&self, kind: &str, instance: u32) -> Result<&Section, FormatError> {
        SectionReader::new(&self.area.sections).take_raw(kind, instance)
    }

    /// All sections but the configuration, to be taken one by one; see [`SectionReader::finish`].
    pub fn sections(&self) -> SectionReader<'_> {
        let mut reader = SectionReader::new(&self.area.sections);
        // It was decoded at open, so it is there.
        let _config = reader.take_raw(CONFIG_KIND, 0);
        reader
    }

    /// Refuses a machine on which the saved guest would notice a difference, naming each, and a
    /// checkpoint whose RAM is not mapped soundly. Returns the differences that it would not notice.
    pub fn check_machine(
        &self,
        machine: &MachineConfig,
        ram: &GuestMemory,
    ) -> Result<Vec<Difference>, LoadError> {
        let differences = machine.differences(&self.config.machine);
        let (differences, notes): (Vec<_>, Vec<_>) =
            differences.into_iter().partition(Difference::is_blocking);
        if !differences.is_empty() {
            return Err(LoadError::Configuration { tag: self.tag.clone(), differences });
        }
        self.stored(ram)?;
        Ok(notes)
    }

    /// Makes guest RAM what it was. `fresh` memory was never written since it was mapped; other
    /// memory is cleared where the checkpoint has nothing. The vCPUs are stopped meanwhile.
    pub fn read_ram(
        &self,
        ram: &GuestMemory,
        fresh: bool,
        threads: usize,
        progress: &Progress,
    ) -> Result<ReviveReport, LoadError> {
        let stored = self.stored(ram)?;
        let failed = |source| self.unread(source);
        progress.add_total(self.area.layout.ram_bytes());
        let vmstate = self.carrier().open().map_err(failed)?;
        revive(&*vmstate, stored, &self.area.layout, &memory::slices(ram), fresh, threads, progress)
            .map_err(failed)
    }

    /// Empties guest RAM, unless it is `fresh` as for [`Checkpoint::read_ram`], and has its pages
    /// read when they are needed, and ahead of that in the order that `orders` has. The vCPUs are stopped, and the devices' threads too, until this
    /// returns.
    pub fn lend_ram(
        &self,
        host: LazyHost,
        ram: &GuestMemory,
        fresh: bool,
        orders: &Arc<Orders>,
        notify: Notify,
    ) -> Result<LazyRam, LoadError> {
        let stored = self.stored(ram)?;
        let Found { format, snapshot, .. } = self.carrier();
        let source = Source {
            format: format.clone(),
            id: snapshot.id.clone(),
            base: self.base(),
            orders: orders.clone(),
        };
        LazyRam::start(host, source, stored, &self.area.layout, ram, fresh, notify)
            .map_err(|source| self.unread(source))
    }

    pub(crate) fn unread(&self, source: block::Error) -> LoadError {
        match source {
            block::Error::Cancelled => LoadError::Cancelled,
            source => LoadError::Ram {
                tag: self.tag.clone(),
                node: self.carrier().node.name().to_owned(),
                source,
            },
        }
    }

    /// What the image stores of RAM, which must be laid out as `ram` is.
    pub(crate) fn stored(&self, ram: &GuestMemory) -> Result<&[Stored], LoadError> {
        self.check_ram(ram)?;
        if let Some(stored) = self.stored.get() {
            return Ok(stored);
        }
        let node = self.carrier().node.name().to_owned();
        let unusable = |source| {
            let source = unreadable("the mapping of RAM")(source);
            LoadError::State { tag: self.tag.clone(), node, source }
        };
        let vmstate = self.carrier().open();
        let stored = vmstate.and_then(|vmstate| stored_parts(&*vmstate, &self.area.layout));
        let stored = stored.map_err(unusable)?;
        Ok(self.stored.get_or_init(|| stored))
    }

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

    /// Keeps the snapshot from being deleted.
    pub(crate) fn open_vmstate(&self) -> block::Result<Box<dyn VmStateRead + '_>> {
        self.carrier().open()
    }

    fn carrier(&self) -> &Found {
        &self.nodes[self.vmstate]
    }

    /// Every node of the checkpoint is there with its size, and no other.
    fn check_disks(&self) -> Result<(), LoadError> {
        let mut reasons = Vec::new();
        for saved in &self.config.nodes {
            let here = self.nodes.iter().find(|n| n.node.name() == saved.node);
            match here.map(|found| found.format.size()) {
                None => reasons.push(format!("'{}' belongs to it and is not given", saved.node)),
                Some(size) if size != saved.size => reasons.push(format!(
                    "'{}' has {}, in the checkpoint {}",
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

    /// Guest memory has the regions that were saved.
    fn check_ram(&self, ram: &GuestMemory) -> Result<(), LoadError> {
        let layout = &self.area.layout;
        let here = memory::ranges(ram);
        let saved = layout.regions().iter().map(|region| (region.start, region.len));
        if here.iter().copied().eq(saved) {
            return Ok(());
        }
        let list = |regions: &mut dyn Iterator<Item = (u64, u64)>| {
            let text = |(start, len)| format!("{} at {start:#x}", human(len));
            regions.map(text).collect::<Vec<_>>().join(", ")
        };
        let saved = list(&mut layout.regions().iter().map(|r| (r.start.0, r.len)));
        let here = list(&mut here.iter().map(|(start, len)| (start.0, *len)));
        let text = format!("RAM regions: the checkpoint has {saved}, this machine {here}");
        Err(LoadError::Configuration {
            tag: self.tag.clone(),
            differences: vec![Difference::blocking(text)],
        })
    }
}

impl Found {
    fn open(&self) -> block::Result<Box<dyn VmStateRead + '_>> {
        self.format.open_vmstate(&self.snapshot.id)
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

fn read_area(node: &Node, snapshot: &SnapshotInfo) -> Result<StateArea, FormatError> {
    let format = node.format();
    let vmstate = format.open_vmstate(&snapshot.id).map_err(unreadable("the VM state"))?;
    StateArea::read(vmstate.size(), |offset, buffer| {
        vmstate.read(offset.0, &[ReadBuf::new(buffer)])
    })
}

fn unreadable(what: &str) -> impl FnOnce(block::Error) -> FormatError {
    let what = what.to_owned();
    move |source| FormatError::Read { what, source: Box::new(source) }
}

fn texts(differences: &[Difference]) -> String {
    let texts: Vec<_> = differences.iter().map(Difference::to_string).collect();
    texts.join("; ")
}
