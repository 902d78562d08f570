//! Loading: everything is checked when a checkpoint is opened; only then is anything touched.

mod disks;
mod error;
mod open;
mod ram;

use std::sync::{Arc, OnceLock};

use block::snapshot::VmStateRead;
use block::{Format, Node, SnapshotInfo};

use crate::about::{Lineage, Stamp};
use crate::config::{CONFIG_KIND, CheckpointConfig};
use crate::format::FormatError;
use crate::format::area::StateArea;
use crate::format::ram::RamLayout;
use crate::format::section::{Section, SectionReader};
pub use crate::revive::ReviveReport;
use crate::revive::Stored;
use crate::track::Base;
pub use disks::{PreparedDisks, ShownDisks};
pub use error::LoadError;

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

/// A node, its image and the snapshot of the tag there. Whoever holds the image keeps a reopen from
/// replacing it.
struct Found {
    node: Arc<Node>,
    format: Arc<dyn Format>,
    snapshot: SnapshotInfo,
}

impl Checkpoint {
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

    /// Keeps the snapshot from being deleted.
    pub(crate) fn open_vmstate(&self) -> block::Result<Box<dyn VmStateRead + '_>> {
        self.carrier().open()
    }

    fn carrier(&self) -> &Found {
        &self.nodes[self.vmstate]
    }
}

impl Found {
    fn open(&self) -> block::Result<Box<dyn VmStateRead + '_>> {
        self.format.open_vmstate(&self.snapshot.id)
    }
}
