//! A save in steps, so that the guest can run between them.
//!
//! ```text
//!  begin ──> write ──> ... ──> switch ──> write_aside ──> finish
//!    │         │                  │             │
//!    └─────────┴── any failure ───┴─────────────┴──> every node is as it was
//! ```
//!
//! What is written before the switch may be of any moment, as long as each page that the guest writes
//! afterwards is written again. From the switch on the disks are those of the checkpoint.

use std::sync::Arc;

use block::qcow2::Compression;
use block::{Format, NewSnapshot, Node, Progress, Saving, SnapshotCreate, WriteBuf};

use super::aside::Aside;
use super::writer::RamWriter;
use super::{SaveError, SaveReport, all_sections, preflight_save};
use crate::about::{About, Stamp};
use crate::config::MachineConfig;
use crate::fault::UNIT;
use crate::fault::guard::WriteGuard;
use crate::format::area::StateArea;
use crate::format::ram::RamLayout;
use crate::format::section::Section;
use crate::nodes::{NodesError, kept_tag};
use crate::order::{ChangeError, NodeChange, all_or_none};
use crate::revive::stored_parts;
use crate::rewind::Rewinder;
use crate::track::{Base, PageSet};
use crate::{GuestMemory, memory};

/// The images of a save, the one with the VM state last: see [`crate::order`]. Whoever holds them
/// keeps a reopen from replacing them.
pub struct SaveImages<'a>(Vec<(&'a Node, Arc<dyn Format>)>);

impl<'a> SaveImages<'a> {
    /// The images that the nodes have now.
    pub fn of(nodes: &'a [Arc<Node>], vmstate: &str) -> Self {
        let (carrier, others): (Vec<_>, Vec<_>) = nodes.iter().partition(|n| n.name() == vmstate);
        Self(others.into_iter().chain(carrier).map(|node| (&**node, node.format())).collect())
    }
}

/// What a save begins with.
pub struct SaveSetup<'a> {
    /// The nodes whose disks belong to the checkpoint.
    pub nodes: &'a [Arc<Node>],
    /// Name of the one that carries the VM state.
    pub vmstate: &'a str,
    /// Tag, and about the times.
    pub stamp: &'a Stamp,
    /// What RAM equals but for the pages that will be written. It is used where it is still there, on
    /// the VM-state node: see [`Save::is_incremental`].
    pub base: Option<&'a Base>,
    /// How VM state is compressed, if it is to be: by the method of the VM-state node's image. What is
    /// shared with the base stays as it is.
    pub compress: Option<Compression>,
    /// Whether pages of RAM may be missing from memory, without being zero.
    pub absent: bool,
    /// Bytes of header and sections at most.
    pub state_bytes: u64,
    /// Guest RAM.
    pub ram: &'a GuestMemory,
    /// Tells bytes of RAM done, and cancels until the first snapshot is published.
    pub progress: &'a Progress,
    /// How many threads write RAM.
    pub threads: usize,
}

/// What a save ends with: the machine at the switch.
pub struct Machine<'a> {
    /// The machine; becomes the configuration section, together with the nodes.
    pub config: &'a MachineConfig,
    /// What is said of the checkpoint; its VM-state node is filled in.
    pub about: About,
    /// All other sections.
    pub sections: Vec<Section>,
    /// Tag and times.
    pub stamp: Stamp,
}

/// A checkpoint that is there.
pub struct Saved {
    /// What was done.
    pub report: SaveReport,
    /// What RAM equalled at the switch.
    pub base: Base,
    /// What is needed to go back to it; none where it is gone already.
    pub rewinder: Option<Rewinder>,
}

/// A save that is under way. Dropping it makes every node as it was.
pub struct Save<'a> {
    setup: SaveSetup<'a>,
    images: &'a SaveImages<'a>,
    creates: Vec<Begun<'a>>,
    writer: RamWriter<'a>,
    incremental: bool,
    /// Nobody takes away what is below the disks.
    _saving: Vec<Saving>,
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

impl<'a> Save<'a> {
    /// Checks, and begins a snapshot on each image.
    pub fn begin(images: &'a SaveImages<'a>, setup: SaveSetup<'a>) -> Result<Self, SaveError> {
        preflight_save(setup.nodes, setup.vmstate, &setup.stamp.tag)?;
        let saving = setup.nodes.iter().map(Node::begin_save).collect::<Result<_, _>>();
        let saving = saving.map_err(|error| NodesError::Busy(error.to_string()))?;
        let least = RamLayout::start_after(setup.state_bytes)
            .ok_or_else(|| state_error("it is too large"))?;
        let mut creates = begin_all(images, setup.stamp)?;
        creates = compress(creates, setup.compress)?;
        let base = setup.base.filter(|base| base.ram_offset >= least.0);
        let inherited = base.is_some_and(|base| inherit(images, &mut creates, &setup, base));
        let start = base.filter(|_| inherited).map_or(least.0, |base| base.ram_offset);
        let start = crate::format::ram::StateOffset(start);
        let writer = RamLayout::new(start, memory::ranges(setup.ram))
            .map_err(|error| block::Error::Invalid(error.to_string()))
            .and_then(|layout| {
                let cluster = creates.last().map_or(0, |begun| begun.change.cluster_size());
                let slices = memory::slices(setup.ram);
                RamWriter::new(slices, layout, cluster, inherited, setup.absent)
            });
        match writer {
            Ok(writer) => {
                Ok(Self { setup, images, creates, writer, incremental: inherited, _saving: saving })
            }
            Err(source) => Err(write_failed(setup.vmstate, source, creates)),
        }
    }

    /// Whether the checkpoint has the base's RAM where none is written: only what differs from the
    /// base has to be. Otherwise all of RAM has to be written.
    pub fn is_incremental(&self) -> bool {
        self.incremental
    }

    /// Whether pages may be missing from memory while it is written to the image, as long as none of them is
    /// dirty: what is written with a dirty page came with it, so nobody is waited for. With larger
    /// clusters more is written, and the host's kernel would wait for a page in the middle of a write, with a
    /// lock held of the file that the page is to be read from.
    pub fn may_be_absent(&self) -> bool {
        self.incremental && self.writer.granule() <= UNIT
    }

    /// Bytes of RAM written so far.
    pub fn stored_bytes(&self) -> u64 {
        self.writer.stored()
    }

    /// Writes what `pages` hold now.
    pub fn write(&mut self, pages: &PageSet) -> Result<(), SaveError> {
        let SaveSetup { threads, progress, .. } = self.setup;
        progress.add_total(pages.bytes());
        self.with_target(|writer, target| writer.write(target, pages, threads, progress))
    }

    /// Makes this the moment of the checkpoint, for the disks. The guest stands still, and with it the
    /// disks; no data is written, so that it need not stand long.
    pub fn switch(&mut self) -> Result<(), SaveError> {
        let switched = self
            .creates
            .iter()
            .try_for_each(|begun| begun.change.switch().map_err(|error| (begun.node, error)));
        match switched {
            Ok(()) => Ok(()),
            Err((node, source)) => {
                let mut changes = self.take_changes();
                let error = ChangeError::at_begin(node, source, &mut changes);
                Err(create_failed(&self.setup.stamp.tag, error))
            }
        }
    }

    /// Writes pages as they were at the switch.
    pub fn write_aside(&mut self, aside: &Aside) -> Result<(), SaveError> {
        let SaveSetup { threads, progress, .. } = self.setup;
        progress.add_total(aside.pages().bytes());
        self.with_target(|writer, target| writer.write_aside(target, aside, threads, progress))
    }

    /// Writes all pages that were armed at the switch, as they were then. `pages` is how many.
    pub fn write_kept(&mut self, guard: &WriteGuard, pages: u64) -> Result<(), SaveError> {
        let progress = self.setup.progress;
        progress.add_total(pages * crate::PAGE_SIZE);
        self.with_target(|writer, target| writer.write_kept(target, guard, progress))
    }

    /// Writes the machine's state and makes the checkpoint durable and visible on all nodes.
    pub fn finish(mut self, machine: Machine<'_>) -> Result<Saved, SaveError> {
        let Machine { config, about, sections, stamp } = machine;
        let about = About { vmstate: self.setup.vmstate.to_owned(), ..about };
        about.check().map_err(|source| SaveError::About { tag: stamp.tag.clone(), source })?;
        let ranges = memory::ranges(self.setup.ram);
        let area = all_sections(self.setup.nodes, config, about, sections).and_then(|sections| {
            StateArea::with_ram_at(self.writer.layout().start(), &ranges, sections)
        });
        let area = match area {
            Ok(area) => area,
            Err(error) => {
                let mut changes = self.take_changes();
                crate::order::rollback(&mut changes);
                return Err(error.into());
            }
        };
        for begun in &mut self.creates {
            begun.change.set_time(stamp.date_sec, stamp.date_nsec, stamp.vm_clock_nsec);
        }
        let state_bytes = self.write_state(&area)?;
        let spared = self.creates.last().map_or(0, |begun| begun.change.spared_bytes());
        let mut changes = self.take_changes();
        all_or_none(&mut changes, Some(self.setup.progress))
            .map_err(|error| create_failed(&stamp.tag, error))?;
        drop(changes);
        let report = SaveReport {
            ram_bytes: area.layout.ram_bytes(),
            stored_bytes: self.writer.stored(),
            zero_bytes: self.writer.zero(),
            state_bytes,
            bytes_written: (self.writer.stored() + state_bytes).saturating_sub(spared),
            vm_state_size: area.layout.total_length(),
            incremental: self.incremental,
        };
        let base = self.base(&stamp, &area)?;
        let SaveSetup { nodes, vmstate, .. } = self.setup;
        let rewinder = Rewinder::saved(nodes, vmstate, &stamp.tag, area.layout);
        Ok(Saved { report, base, rewinder })
    }

    /// Header and sections; what an inherited area has behind them goes.
    fn write_state(&mut self, area: &StateArea) -> Result<u64, SaveError> {
        let incremental = self.incremental;
        let (start, total) = (area.layout.start().0, area.layout.total_length());
        let mut bytes = 0;
        self.with_target(|_, target| {
            let state = area.encode_padded(target.cluster_size());
            bytes = state.len() as u64;
            target.write_vmstate(0, &[WriteBuf::new(&state)])?;
            if incremental {
                target.zero_vmstate(bytes, start - bytes)?;
            }
            Ok(())
        })?;
        if let Some(begun) = self.creates.last_mut() {
            begun.change.set_vmstate_size(total);
        }
        Ok(bytes)
    }

    /// The snapshot that was just published.
    fn base(&self, stamp: &Stamp, area: &StateArea) -> Result<Base, SaveError> {
        let tag = kept_tag(&stamp.tag);
        let (node, format) = self.images.0.last().ok_or(NodesError::Empty)?;
        let found = format.snapshots().into_iter().rev().find(|snapshot| snapshot.tag == tag);
        let snapshot = found.ok_or_else(|| NodesError::NoVmState(node.name().to_owned()))?;
        Ok(Base { node: node.name().to_owned(), snapshot, ram_offset: area.layout.start().0 })
    }

    /// Does something with the VM-state node's snapshot; a failure undoes all of them.
    fn with_target(
        &mut self,
        work: impl FnOnce(&RamWriter<'a>, &dyn SnapshotCreate) -> block::Result<()>,
    ) -> Result<(), SaveError> {
        let carrier = self.creates.last().ok_or(NodesError::Empty)?;
        let result = work(&self.writer, &*carrier.change);
        // An error that follows from a cancel counts as the cancel.
        match self.setup.progress.check().and(result) {
            Ok(()) => Ok(()),
            Err(source) => {
                let creates = std::mem::take(&mut self.creates);
                Err(write_failed(self.setup.vmstate, source, creates))
            }
        }
    }

    fn take_changes(&mut self) -> Vec<NodeChange<'a>> {
        std::mem::take(&mut self.creates).into_iter().map(Begun::into_change).collect()
    }
}

impl Drop for Save<'_> {
    fn drop(&mut self) {
        crate::order::rollback(&mut self.take_changes());
    }
}

/// Begins the snapshot on every image in turn.
fn begin_all<'a>(images: &'a SaveImages<'a>, stamp: &Stamp) -> Result<Vec<Begun<'a>>, SaveError> {
    let new = NewSnapshot {
        tag: kept_tag(&stamp.tag).to_owned(),
        date_sec: stamp.date_sec,
        date_nsec: stamp.date_nsec,
        vm_clock_nsec: stamp.vm_clock_nsec,
    };
    let mut begun: Vec<Begun<'_>> = Vec::with_capacity(images.0.len());
    for (node, format) in &images.0 {
        match format.create_snapshot(&new) {
            Ok(change) => begun.push(Begun { node: node.name(), change }),
            Err(source) => {
                let mut changes: Vec<_> = begun.into_iter().map(Begun::into_change).collect();
                let error = ChangeError::at_begin(node.name(), source, &mut changes);
                return Err(create_failed(&new.tag, error));
            }
        }
    }
    Ok(begun)
}

/// Has the VM-state area start as the base's. False where the base is not there any more, not on
/// this node, or cannot be shared: all of RAM has to be written then.
fn inherit(
    images: &SaveImages<'_>,
    creates: &mut [Begun<'_>],
    setup: &SaveSetup<'_>,
    base: &Base,
) -> bool {
    let (Some((_, format)), Some(begun)) = (images.0.last(), creates.last_mut()) else {
        return false;
    };
    let there = base.node == setup.vmstate && format.snapshots().iter().any(|s| base.is(s));
    if !there {
        return false;
    }
    // Looked at before anything depends on it: what is shared with a damaged one is lost with it.
    let whole = check_base(&**format, setup, base);
    match whole.and_then(|()| begun.change.inherit_vmstate(&base.snapshot.id)) {
        Ok(_) => true,
        Err(error) => {
            let tag = &base.snapshot.tag;
            tracing::warn!(%error, "checkpoint '{tag}' cannot be built upon: all of RAM is saved");
            false
        }
    }
}

/// Walks the mapping of all RAM in a base, which reads its tables.
fn check_base(format: &dyn Format, setup: &SaveSetup<'_>, base: &Base) -> block::Result<()> {
    let start = crate::format::ram::StateOffset(base.ram_offset);
    let layout = RamLayout::new(start, memory::ranges(setup.ram))
        .map_err(|error| block::Error::Invalid(error.to_string()))?;
    let vmstate = format.open_vmstate(&base.snapshot.id)?;
    stored_parts(&*vmstate, &layout).map(drop)
}

/// Has VM state compressed where it is to be.
fn compress(
    mut creates: Vec<Begun<'_>>,
    method: Option<Compression>,
) -> Result<Vec<Begun<'_>>, SaveError> {
    let (Some(method), Some(Begun { node, change })) = (method, creates.last_mut()) else {
        return Ok(creates);
    };
    let node = *node;
    match change.compress_vmstate(method) {
        Ok(()) => Ok(creates),
        Err(source) => {
            let mut changes: Vec<_> = creates.into_iter().map(Begun::into_change).collect();
            let source = ChangeError::at_begin(node, source, &mut changes);
            Err(SaveError::Compression { source })
        }
    }
}

fn state_error(text: &str) -> SaveError {
    crate::format::FormatError::Header(text.to_owned()).into()
}

/// VM state could not be written: all is undone.
fn write_failed(vmstate: &str, source: block::Error, creates: Vec<Begun<'_>>) -> SaveError {
    let mut changes: Vec<_> = creates.into_iter().map(Begun::into_change).collect();
    let error = ChangeError::at_begin(vmstate, source, &mut changes);
    if error.is_cancelled() { SaveError::Cancelled } else { SaveError::Write { source: error } }
}

/// A snapshot could not be made.
fn create_failed(tag: &str, source: ChangeError) -> SaveError {
    if source.is_cancelled() {
        return SaveError::Cancelled;
    }
    SaveError::Create { tag: kept_tag(tag).to_owned(), source }
}

/// Copies pages of RAM for [`Save::write_aside`]: see [`Aside::copy`].
pub fn set_aside(ram: &GuestMemory, pages: PageSet, room: super::aside::Room) -> Aside {
    Aside::copy(&memory::slices(ram), pages, room)
}
