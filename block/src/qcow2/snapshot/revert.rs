//! Going back to a snapshot.
//!
//! prepare: a reference is taken to everything below the snapshot's disk, its L1 table is copied to
//!          fresh clusters; all durable.
//! show:    size and L1 table are switched in memory; every sync from then on writes the header first. Until one
//!          has, a crash shows the old disk as the disk has it.
//! publish: one header write switches size, L1 offset and L1 size.
//! finish:  references of the old disk's tree are given back, table by table with requests let in between.
//!
//! Dirty bitmaps that follow writes have the whole disk afterwards. (QEMU refuses to go back where
//! there is a bitmap.)
//!
//! The VM state of the snapshot stays the snapshot's: the active table maps the disk only.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::num::be_bytes;
use crate::qcow2::Qcow2;
use crate::qcow2::flush::Member;
use crate::qcow2::header::field;
use crate::qcow2::layout::Run;
use crate::qcow2::meta::Meta;
use crate::snapshot::SnapshotChange;
use crate::{Result, Together, WriteBuf};

use super::table::Entry;
use super::{Stage, begin_change, find, flush_ahead_of, load_l1, tree, write_l1};

/// An L1 table and the disk it maps.
struct Active {
    l1: Vec<u64>,
    offset: u64,
    disk_size: u64,
}

impl Active {
    fn of(meta: &Meta) -> Self {
        Self { l1: meta.l1.clone(), offset: meta.header.l1_offset, disk_size: meta.header.size }
    }
}

/// Writes disk size, L1 size and L1 offset to the header.
pub(in crate::qcow2) fn write_disk_place(
    meta: &Meta,
    disk_size: u64,
    l1_offset: u64,
    l1_size: u32,
) -> Result<()> {
    let mut fields = [0; 24];
    fields[..8].copy_from_slice(&disk_size.to_be_bytes());
    fields[12..16].copy_from_slice(&l1_size.to_be_bytes());
    fields[16..].copy_from_slice(&l1_offset.to_be_bytes());
    // One write within one sector (bytes 24 to 48; the encryption method in between is 0).
    meta.write_field(field::SIZE, &fields)
}

/// Writes all of an L1 table to its place, durably: the disk may not have what was changed in memory.
fn write_table(meta: &Meta, active: &Active) -> Result<()> {
    meta.storage.write_at(active.offset, &[WriteBuf::new(&be_bytes(&active.l1))])?;
    meta.storage.flush()
}

/// A revert that is under way; the module has the steps.
pub(in crate::qcow2) struct Revert<'a> {
    image: &'a Qcow2,
    entry: Entry,
    /// The snapshot's disk part.
    l1: Vec<u64>,
    /// Whether references were taken below `l1`.
    taken: bool,
    run: Option<Run>,
    old: Option<(Active, Run)>,
    /// The old disk was left in memory: its L1 table on disk may be behind.
    shown: bool,
    stage: Stage,
}

impl<'a> Revert<'a> {
    /// Starts going back to snapshot `id`.
    pub(crate) fn begin(image: &'a Qcow2, id: &str) -> Result<Self> {
        let (entry, l1) = begin_change(image, |meta| {
            let entry = find(meta, id)?;
            let l1 = load_l1(meta, &entry)?;
            let count = meta.geometry().l1_entries(entry.info.disk_size);
            let mut l1 = tree::plain_entries(&l1, count);
            // A table without entries would have no place.
            l1.resize(l1.len().max(1), 0);
            Ok((entry, l1))
        })?;
        Ok(Self {
            image,
            entry,
            l1,
            taken: false,
            run: None,
            old: None,
            shown: false,
            stage: Stage::Begun,
        })
    }

    /// Switches the active disk, on disk first. The caller holds the whole disk exclusively.
    fn switch(&self, meta: &mut Meta, to: &Active) -> Result<()> {
        let size = u32::try_from(to.l1.len()).unwrap_or(u32::MAX);
        write_disk_place(meta, to.disk_size, to.offset, size)?;
        meta.storage.flush()?;
        self.put(meta, to);
        Ok(())
    }

    /// Switches the active disk in memory.
    fn put(&self, meta: &mut Meta, to: &Active) {
        let size = u32::try_from(to.l1.len()).unwrap_or(u32::MAX);
        meta.replace_l1(to.l1.clone(), to.offset, size);
        meta.header.size = to.disk_size;
        self.image.size.store(to.disk_size, Ordering::Release);
    }

    /// What the active disk becomes.
    fn target(&self, meta: &Meta) -> Active {
        Active {
            l1: self.l1.clone(),
            offset: self.run.map_or(0, |run| meta.geometry().offset_of(run.first).0),
            disk_size: self.entry.info.disk_size,
        }
    }

    /// Frees what `prepare` took.
    fn undo_prepare(&mut self, meta: &mut Meta, l1: &[u64]) -> Result<()> {
        let freed = if std::mem::take(&mut self.taken) { tree::sub_refs(meta, l1) } else { Ok(()) };
        let run = match self.run.take() {
            Some(run) => meta.free(run),
            None => Ok(()),
        };
        let copied = tree::set_copied(meta);
        let synced = meta.sync();
        meta.truncate_tail();
        freed.and(run).and(copied).and(synced)
    }
}

impl SnapshotChange for Revert<'_> {
    fn prepare(&mut self) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        let mut meta = self.image.meta();
        meta.check_writable()?;
        // Those of another size would not fit the disk after a crash behind `publish`.
        self.image.bitmaps_before_resize(&mut meta, self.entry.info.disk_size)?;
        tree::add_refs(&mut meta, &self.l1)?;
        self.taken = true;
        self.run = Some(write_l1(&mut meta, &self.l1)?);
        meta.sync()?;
        self.stage = Stage::Prepared;
        Ok(())
    }

    fn show(&mut self, together: &Arc<Together>) -> Result<()> {
        self.stage.expect(Stage::Prepared)?;
        let _held = self.image.in_flight.exclusive(0..u64::MAX);
        let mut meta = self.image.meta();
        meta.check_writable()?;
        if meta.is_switching() {
            // Other tables are about to be in force.
            meta.sync()?;
        }
        let old = (Active::of(&meta), meta.l1_run());
        let new = self.target(&meta);
        self.put(&mut meta, &new);
        // The new table has been durable since `prepare`, and all that it leads to, so the header may lead to it
        // at any time. What left the old tables in memory is given back after a sync, hence after the header.
        meta.unsettled = true;
        meta.member = Some(Member::join(together, self.image.me.clone()));
        self.image.bitmaps_after_revert(new.disk_size);
        self.old = Some(old);
        self.shown = true;
        self.stage = Stage::Shown;
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        if self.stage == Stage::Shown {
            // Nobody goes back from what a guest has seen. What the old disk had is leaked after an error.
            self.stage = Stage::Ended;
            if let Err(error) = self.image.flush_alone() {
                let mut meta = self.image.meta();
                meta.changing = false;
                if let Some(member) = &meta.member {
                    member.together().failed();
                }
                return Err(error);
            }
            self.stage = Stage::Published;
            return Ok(());
        }
        self.stage.expect(Stage::Prepared)?;
        let _held = self.image.in_flight.exclusive(0..u64::MAX);
        let mut meta = self.image.meta();
        // The old disk must be whole on disk: its tables in memory are about to be left.
        meta.sync()?;
        let old = (Active::of(&meta), meta.l1_run());
        let new = self.target(&meta);
        if let Err(e) = self.switch(&mut meta, &new) {
            // The header may have either; settle it. If that fails too, keep all clusters.
            if let Err(again) = self.switch(&mut meta, &old.0) {
                tracing::error!("the header could not be restored: {again}");
                meta.unsettled = true;
                self.taken = false;
                self.run = None;
            }
            return Err(e);
        }
        self.image.bitmaps_after_revert(new.disk_size);
        self.old = Some(old);
        self.stage = Stage::Published;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Published)?;
        self.stage = Stage::Ended;
        let image = self.image;
        let (old, run) = self.old.take().unzip();
        let old = old.map_or_else(Vec::new, |old| old.l1);
        let freed = tree::sub_refs_by_table(image, &old);
        let freed = freed.and_then(|()| run.map_or(Ok(()), |run| image.meta().free(run)));
        let copied = tree::set_copied_by_table(image);
        let ahead = flush_ahead_of(image, &old);
        let mut meta = image.meta();
        // No other change begins before all is given back.
        meta.changing = false;
        let synced = image.freeze(meta).sync();
        image.give_space_back();
        freed.and(copied).and(ahead).and(synced)
    }

    fn rollback(&mut self) -> Result<()> {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        if stage == Stage::Ended {
            return Ok(());
        }
        let image = self.image;
        let _held = image.in_flight.exclusive(0..u64::MAX);
        let mut meta = image.meta();
        meta.changing = false;
        let mut l1 = self.l1.clone();
        if let Some((old, _)) = self.old.take() {
            // Writes since `publish` went to the new tree: that is what must be given back.
            meta.sync()?;
            l1.clone_from(&meta.l1);
            if self.shown {
                // What the disk has of it can lead to clusters that were given back. If this fails, the image
                // stays at the snapshot.
                write_table(&meta, &old)?;
                meta.member = None;
            }
            let back = self.switch(&mut meta, &old);
            if back.is_err() {
                // The next sync writes the header; until then the disk may have either.
                self.put(&mut meta, &old);
                meta.unsettled = true;
            }
            self.image.bitmaps_after_revert(old.disk_size);
            back?;
        }
        if self.taken || self.run.is_some() {
            self.undo_prepare(&mut meta, &l1)?;
        }
        Ok(())
    }
}

impl Drop for Revert<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.rollback() {
            tracing::error!("going back to a snapshot was not undone wholly: {e}");
        }
    }
}
