//! Making a snapshot, with VM state or without.
//!
//! write_vmstate: clusters are taken and written; only this object knows of them ([`super::area`]).
//! switch:  the snapshot point; memory only ([`super::point`]).
//! prepare: a reference is taken to everything that was below the active L1 table at the switch, and to
//!          inherited VM state; VM-state tables, the L1 table and the new snapshot table go to fresh
//!          clusters; all durable. Without a switch before it does that first.
//! publish: one header write.
//! finish:  the old snapshot table is freed.
//!
//! The VM state hangs on the snapshot's own L1 table only; the active one never sees it.

use crate::num::to_u64;
use crate::qcow2::Qcow2;
use crate::qcow2::header::{Compression, MAX_SNAPSHOTS};
use crate::qcow2::layout::Run;
use crate::qcow2::meta::Meta;
use crate::snapshot::{NewSnapshot, SnapshotChange, SnapshotCreate, SnapshotInfo};
use crate::{Error, Result, WriteBuf};

use super::area::Area;
use super::table::{Entry, TableSwitch};
use super::{Point, Stage, begin_change, point, write_l1};

/// A snapshot that is being made; the module has the steps.
pub(in crate::qcow2) struct Create<'a> {
    image: &'a Qcow2,
    new: NewSnapshot,
    area: Area<'a>,
    vm_state_size: u64,
    /// The clusters of the snapshot's L1 table.
    l1_run: Option<Run>,
    table: Option<TableSwitch>,
    stage: Stage,
}

impl<'a> Create<'a> {
    /// Starts a new snapshot.
    pub(crate) fn begin(image: &'a Qcow2, new: &NewSnapshot) -> Result<Self> {
        begin_change(image, |meta| match to_u64(meta.snapshots.len()) < MAX_SNAPSHOTS.into() {
            true => Ok(()),
            false => Err(Error::NotSupported(format!(
                "Image '{}' has {MAX_SNAPSHOTS} snapshots already",
                meta.storage.name()
            ))),
        })?;
        Ok(Self {
            image,
            new: new.clone(),
            area: Area::new(image),
            vm_state_size: 0,
            l1_run: None,
            table: None,
            stage: Stage::Begun,
        })
    }

    fn entry(&self, meta: &Meta, l1: Run, l1_size: usize) -> Entry {
        let id = meta
            .snapshots
            .iter()
            .filter_map(|entry| entry.info.id.parse::<u64>().ok())
            .max()
            .unwrap_or(0)
            .saturating_add(1);
        let (id, tag) = (id.to_string(), cut(&self.new.tag, 255));
        Entry {
            id: id.as_bytes().to_vec(),
            tag: tag.as_bytes().to_vec(),
            info: SnapshotInfo {
                id,
                tag: tag.to_owned(),
                vm_state_size: self.vm_state_size,
                disk_size: meta.header.size,
                date_sec: self.new.date_sec,
                date_nsec: self.new.date_nsec,
                vm_clock_nsec: self.new.vm_clock_nsec,
                icount: None,
            },
            l1_offset: meta.geometry().offset_of(l1.first).0,
            l1_size: u32::try_from(l1_size).unwrap_or(u32::MAX),
            unknown_extra: Vec::new(),
        }
    }

    /// Frees all that was taken.
    fn give_back(&mut self) -> Result<()> {
        let result = point::give_back(self.image);
        let mut meta = self.image.meta();
        let area = self.area.give_back(&mut meta);
        let l1 = self.l1_run.take().map_or(Ok(()), |run| meta.free(run));
        result.and(area).and(l1)
    }
}

/// At most `most` bytes of a text, not splitting a character.
fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl SnapshotCreate for Create<'_> {
    fn inherit_vmstate(&mut self, id: &str) -> Result<u64> {
        self.stage.expect(Stage::Begun)?;
        self.vm_state_size = self.area.inherit(id)?;
        Ok(self.vm_state_size)
    }

    fn write_vmstate(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        self.area.write(offset, bufs)
    }

    fn zero_vmstate(&self, offset: u64, len: u64) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        self.area.zero(offset, len)
    }

    fn switch(&self) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        // Requests in flight are before the snapshot point, later ones after it.
        let _held = self.image.in_flight.exclusive(0..u64::MAX);
        self.image.meta().pass_point()
    }

    fn compress_vmstate(&mut self, method: Compression) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        self.image.check_compresses_with(method)?;
        self.area.compress = true;
        Ok(())
    }

    fn spared_bytes(&self) -> u64 {
        self.area.spared()
    }

    fn set_vmstate_size(&mut self, size: u64) {
        self.vm_state_size = size;
    }

    fn set_time(&mut self, date_sec: u32, date_nsec: u32, vm_clock_nsec: u64) {
        self.new = NewSnapshot { date_sec, date_nsec, vm_clock_nsec, ..self.new.clone() };
    }

    fn cluster_size(&self) -> u64 {
        self.image.geometry.cluster_size()
    }
}

impl SnapshotChange for Create<'_> {
    fn prepare(&mut self) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        self.area.settle(self.vm_state_size)?;
        let image = self.image;
        let passed = image.meta().point.is_some();
        if !passed {
            self.switch()?;
        }
        point::take_all(image)?;
        image.flush_ahead()?;
        let mut meta = image.meta();
        meta.check_writable()?;
        let vm = self.area.take(&mut meta, self.vm_state_size)?;
        let disk = meta.point.as_ref().map_or(&[][..], Point::l1);
        let mut l1 = [disk, &vm].concat();
        // A table without entries would have no place.
        l1.resize(l1.len().max(1), 0);
        let l1_run = write_l1(&mut meta, &l1)?;
        self.l1_run = Some(l1_run);
        let mut entries = meta.snapshots.clone();
        entries.push(self.entry(&meta, l1_run, l1.len()));
        self.table = Some(TableSwitch::write(&mut meta, entries)?);
        // The active tables lose their flags as the counts go up, in one write. All is durable before
        // anything refers to the snapshot.
        image.freeze(meta).sync()?;
        self.stage = Stage::Prepared;
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Prepared)?;
        if let Some(table) = &mut self.table {
            table.publish(&mut self.image.meta())?;
        }
        self.stage = Stage::Published;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Published)?;
        self.stage = Stage::Ended;
        self.area.close();
        let mut meta = self.image.meta();
        meta.changing = false;
        meta.point = None;
        let freed = match &mut self.table {
            Some(table) => table.finish(&mut meta),
            None => Ok(()),
        };
        let written = meta.put_counts();
        drop(meta);
        self.image.give_space_back();
        freed.and(written)
    }

    fn rollback(&mut self) -> Result<()> {
        if self.stage == Stage::Ended {
            return Ok(());
        }
        self.area.close();
        let image = self.image;
        self.stage = Stage::Ended;
        let mut meta = image.meta();
        if let Some(table) = &mut self.table
            && let Err(e) = table.undo(&mut meta)
        {
            // The header on disk may have the snapshot: all clusters are kept.
            meta.point = None;
            meta.changing = false;
            return Err(e);
        }
        drop(meta);
        // No other change begins before all is given back.
        let freed = self.give_back();
        let ahead = image.flush_ahead();
        let mut meta = image.meta();
        meta.changing = false;
        let synced = image.freeze(meta).sync();
        image.give_space_back();
        freed.and(ahead).and(synced)
    }
}

impl Drop for Create<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.rollback() {
            tracing::error!("a snapshot was not undone wholly: {e}");
        }
    }
}
