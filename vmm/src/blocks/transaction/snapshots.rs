//! Internal snapshots of disks: as actions, and as commands of their own.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::{Format, NewSnapshot, Node, SnapshotCreate};
use qmp::schema::{InternalSnapshotArguments, InternalSnapshotDeleteArguments};
use qmp::transaction::Action;

use crate::blocks::{Answer, Blocks, failed, text};

/// The time that all snapshots of a transaction have.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    sec: u32,
    nsec: u32,
}

impl Moment {
    /// Now; in microseconds, as QEMU's.
    pub fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sec = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        Self { sec, nsec: now.subsec_micros() * 1000 }
    }

    fn snapshot(&self, tag: &str) -> NewSnapshot {
        NewSnapshot {
            tag: tag.to_owned(),
            date_sec: self.sec,
            date_nsec: self.nsec,
            // No guest's clock belongs to a disk alone; as with QEMU's daemon it is the host's.
            vm_clock_nsec: u64::from(self.sec) * 1_000_000_000 + u64::from(self.nsec),
        }
    }
}

/// blockdev-snapshot-internal-sync.
pub(super) struct InternalSnapshot<'a> {
    blocks: &'a Blocks,
    arguments: &'a InternalSnapshotArguments,
    format: Option<&'a Arc<dyn Format>>,
    moment: &'a Moment,
    change: Option<Box<dyn SnapshotCreate + 'a>>,
}

impl<'a> InternalSnapshot<'a> {
    pub(super) fn new(
        blocks: &'a Blocks,
        arguments: &'a InternalSnapshotArguments,
        format: Option<&'a Arc<dyn Format>>,
        moment: &'a Moment,
    ) -> Self {
        Self { blocks, arguments, format, moment, change: None }
    }

    fn check(&self) -> Result<&'a dyn Format, qmp::Error> {
        let InternalSnapshotArguments { device, name } = self.arguments;
        let node = self.blocks.graph().get(device);
        let (Some(node), Some(format)) = (node, self.format) else {
            return Err(qmp::Error::no_node(device));
        };
        self.blocks.graph().check_root(device).map_err(failed)?;
        self.blocks.graph().check_unclaimed(device).map_err(failed)?;
        if node.read_only() {
            return Err(text(format!("Device '{device}' is read only")));
        }
        if !format.supports_snapshots() {
            return Err(text(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                format.driver()
            )));
        }
        if name.is_empty() {
            return Err(text("Name is empty"));
        }
        if name.contains('\0') {
            return Err(text(format!("Name '{}' contains a NUL character", name.escape_debug())));
        }
        if format.snapshots().iter().any(|snapshot| snapshot.tag == *name) {
            let words = format!("Snapshot with name '{name}' already exists on device '{device}'");
            return Err(text(words));
        }
        Ok(&**format)
    }

    fn failed(&self, error: &block::Error) -> qmp::Error {
        let InternalSnapshotArguments { device, name } = self.arguments;
        text(format!("Failed to create snapshot '{name}' on device '{device}': {error}"))
    }

    fn step(
        &mut self,
        step: impl FnOnce(&mut dyn SnapshotCreate) -> block::Result<()>,
    ) -> Result<(), qmp::Error> {
        let result = self.change.as_mut().map_or(Ok(()), |change| step(&mut **change));
        result.map_err(|error| self.failed(&error))
    }
}

impl Action for InternalSnapshot<'_> {
    fn prepares_long(&self) -> bool {
        true
    }

    fn lets_go_early(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<(), qmp::Error> {
        let format = self.check()?;
        let new = self.moment.snapshot(&self.arguments.name);
        self.change = Some(format.create_snapshot(&new).map_err(|error| self.failed(&error))?);
        Ok(())
    }

    fn point(&mut self) -> Result<(), qmp::Error> {
        self.step(|change| change.switch())
    }

    fn secure(&mut self) -> Result<(), qmp::Error> {
        self.step(|change| change.prepare())
    }

    fn publish(&mut self) -> Result<(), qmp::Error> {
        self.step(|change| change.publish())
    }

    fn commit(&mut self) {
        if let Some(mut change) = self.change.take()
            && let Err(error) = change.finish()
        {
            let device = &self.arguments.device;
            tracing::warn!(device, %error, "clusters are leaked; 'qemu-img check -r leaks' reclaims them");
        }
    }

    fn abort(&mut self) {
        if let Some(mut change) = self.change.take()
            && let Err(error) = change.rollback()
        {
            let InternalSnapshotArguments { device, name } = self.arguments;
            tracing::error!("snapshot '{name}' on '{device}' cannot be undone: {error}");
        }
    }
}

impl Blocks {
    /// blockdev-snapshot-delete-internal-sync: tells of the snapshot that it deleted.
    pub(in crate::blocks) fn delete_internal_snapshot(
        &self,
        arguments: &InternalSnapshotDeleteArguments,
    ) -> Answer {
        let InternalSnapshotDeleteArguments { device, id, name } = arguments;
        let node: Arc<Node> =
            self.graph().get(device).ok_or_else(|| qmp::Error::no_node(device))?;
        self.graph().check_root(device).map_err(failed)?;
        self.graph().check_unclaimed(device).map_err(failed)?;
        let (id, name) = (id.as_deref(), name.as_deref());
        if id.is_none() && name.is_none() {
            return Err(text("Name or id must be provided"));
        }
        let format = node.format();
        let found = format.snapshots().into_iter().find(|snapshot| {
            id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.tag == name)
        });
        let Some(snapshot) = found else {
            return Err(text(format!(
                "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                id.unwrap_or("null"),
                name.unwrap_or("null")
            )));
        };
        if node.read_only() {
            return Err(text(format!("Device '{device}' is read only")));
        }
        let mut change = format.delete_snapshot(&snapshot.id).map_err(failed)?;
        let deleted = change.prepare().and_then(|()| change.publish());
        if let Err(error) = deleted {
            if let Err(error) = change.rollback() {
                tracing::error!("a snapshot of '{device}' cannot be put back: {error}");
            }
            return Err(failed(error));
        }
        if let Err(error) = change.finish() {
            tracing::warn!(device, %error, "clusters are leaked; 'qemu-img check -r leaks' reclaims them");
        }
        Ok(block::graph::snapshot_json(&snapshot))
    }
}
