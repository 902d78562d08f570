//! Making a snapshot, with VM state or without.
//!
//! write_vmstate: clusters are taken and written; only this object knows of them.
//! prepare: the snapshot point. A reference is taken to everything below the active L1 table, which
//!          is copied; VM-state tables, L1 copy and the new snapshot table go to fresh clusters;
//!          all durable.
//! publish: one header write.
//! finish:  the old snapshot table is freed.
//!
//! The VM state hangs on the snapshot's own L1 table only; the active one never sees it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::qcow2::Qcow2;
use crate::qcow2::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::qcow2::layout::{Run, push_run};
use crate::qcow2::meta::Meta;
use crate::snapshot::{NewSnapshot, SnapshotChange, SnapshotCreate, SnapshotInfo};
use crate::{Error, Result, WriteBuf};

use super::table::{Entry, TableSwitch};
use super::{Stage, begin_change, tree, write_fresh, write_l1};

/// File space is taken ahead of VM-state writes: as much as was written so far, within these bounds.
const RESERVE: std::ops::RangeInclusive<u64> = 4 << 20..=256 << 20;
/// Most bytes of VM state that one run of clusters is taken for.
const MAX_RUN: u64 = 256 << 20;

/// The VM state written so far.
#[derive(Debug, Default)]
struct VmArea {
    /// L2 tables by their index from the start of the area; entries are host offsets.
    tables: BTreeMap<u64, Vec<u64>>,
    runs: Vec<Run>,
    /// Host offset up to which file space is taken.
    reserved: u64,
}

/// See the module.
pub(in crate::qcow2) struct Create<'a> {
    image: &'a Qcow2,
    new: NewSnapshot,
    area: Mutex<VmArea>,
    vm_state_size: u64,
    /// The disk part of the L1 copy, once references are taken below it.
    taken: Option<Vec<u64>>,
    /// Clusters of tables that belong to the snapshot.
    own: Vec<Run>,
    switch: Option<TableSwitch>,
    /// Whether `prepare` was tried: flags of the active tables may have changed.
    tried: bool,
    stage: Stage,
}

impl<'a> Create<'a> {
    /// Starts a new snapshot.
    pub(crate) fn begin(image: &'a Qcow2, new: &NewSnapshot) -> Result<Self> {
        begin_change(image)?;
        let mut meta = image.meta();
        if to_u64(meta.snapshots.len()) >= u64::from(MAX_SNAPSHOTS) {
            meta.changing = false;
            return Err(Error::NotSupported(format!(
                "Image '{}' has {MAX_SNAPSHOTS} snapshots already",
                meta.storage.name()
            )));
        }
        drop(meta);
        Ok(Self {
            image,
            new: new.clone(),
            area: Mutex::default(),
            vm_state_size: 0,
            taken: None,
            own: Vec::new(),
            switch: None,
            tried: false,
            stage: Stage::Begun,
        })
    }

    fn area(&self) -> MutexGuard<'_, VmArea> {
        self.area.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes one run of clusters that was taken for it.
    fn write_run(&self, run: Run, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let geometry = self.image.geometry;
        let (start, end) = (geometry.offset_of(run.first).0, geometry.offset_of(run.end()).0);
        {
            let storage = &self.image.storage;
            let mut area = self.area();
            if end <= storage.len()? {
                // In the place of something freed: what is around it is another's, or is free and
                // shall take no space.
            } else if end > area.reserved {
                let written: u64 = area.runs.iter().map(|run| run.count).sum();
                let more = geometry.bytes_of(written).clamp(*RESERVE.start(), *RESERVE.end());
                // Ahead, so that parallel writes find the space there; on a disk that is nearly
                // full, just what is needed.
                area.reserved = if storage.reserve(start, end - start + more).is_ok() {
                    end + more
                } else {
                    storage.reserve(start, end - start)?;
                    end
                };
            }
        }
        self.image.storage.write_bulk(start, bufs)
    }

    /// Notes where a part of the VM state is. A part may be written once.
    fn note(&self, offset: u64, run: Run) -> Result<()> {
        let geometry = self.image.geometry;
        let mut area = self.area();
        let slot = |n: u64| {
            let cluster = (offset >> geometry.cluster_bits) + n;
            (cluster >> geometry.l2_bits(), to_usize(cluster & (geometry.l2_entries() - 1)))
        };
        for n in 0..run.count {
            let (table, index) = slot(n);
            if area.tables.get(&table).is_some_and(|t| t[index] != 0) {
                return Err(Error::Invalid(format!("VM state at {offset:#x} is written twice")));
            }
        }
        for n in 0..run.count {
            let (table, index) = slot(n);
            let entries = area
                .tables
                .entry(table)
                .or_insert_with(|| vec![0; to_usize(geometry.l2_entries())]);
            entries[index] = geometry.offset_of(run.first + n).0;
        }
        push_run(&mut area.runs, run);
        Ok(())
    }

    /// Writes the VM state's L2 tables; gives the L1 entries that refer to them.
    fn write_vm_tables(&mut self, meta: &mut Meta) -> Result<Vec<u64>> {
        let geometry = meta.geometry();
        let mut l1 = Vec::new();
        let area = self.area.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (index, entries) in &area.tables {
            // Clusters of VM state are written whole: all their subclusters are allocated.
            let all = |entry: u64| u64::from(if entry == 0 { 0 } else { u32::MAX });
            let words =
                |entry: &u64| [*entry, all(*entry)].into_iter().take(geometry.entry_words());
            let bytes: Vec<u8> =
                entries.iter().flat_map(words).flat_map(u64::to_be_bytes).collect();
            let run = write_fresh(meta, bytes)?;
            self.own.push(run);
            l1.resize(to_usize(*index), 0);
            l1.push(geometry.offset_of(run.first).0);
        }
        Ok(l1)
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

    /// Whether disk and VM state up to `end` fit in one L1 table.
    fn check_mappable(&self, end: u64) -> Result<()> {
        let geometry = self.image.geometry;
        let entries =
            geometry.l1_entries(self.image.disk_size()).checked_add(geometry.l1_entries(end));
        if entries.is_none_or(|n| n > MAX_L1_BYTES / 8) {
            return Err(Error::NotSupported(format!(
                "VM state up to {end:#x} is beyond what the image can map with {} byte clusters",
                geometry.cluster_size()
            )));
        }
        Ok(())
    }

    fn check_size(&self) -> Result<()> {
        let geometry = self.image.geometry;
        self.check_mappable(self.vm_state_size)?;
        let mut area = self.area();
        let written = area.tables.last_entry().map_or(0, |last| {
            let used = last.get().iter().rposition(|e| *e != 0).unwrap_or(0);
            (last.key() * geometry.l2_entries() + to_u64(used)) << geometry.cluster_bits
        });
        if self.vm_state_size < written {
            return Err(Error::Invalid(format!(
                "VM-state size {} is below what was written ({written})",
                self.vm_state_size
            )));
        }
        Ok(())
    }

    /// Frees all that was taken.
    fn give_back(&mut self, meta: &mut Meta) -> Result<()> {
        let mut result = Ok(());
        if let Some(l1) = self.taken.take() {
            result = result.and(tree::sub_refs(meta, &l1));
        }
        let area = self.area.get_mut().unwrap_or_else(PoisonError::into_inner);
        let runs = std::mem::take(&mut self.own);
        for run in runs.into_iter().chain(std::mem::take(&mut area.runs)) {
            result = result.and(meta.free(run));
        }
        area.tables.clear();
        if self.tried {
            result = result.and(tree::set_copied(meta));
        }
        result
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
    fn write_vmstate(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        let geometry = self.image.geometry;
        let len = iobuf::total_len(bufs);
        if geometry.in_cluster(offset) != 0 || geometry.in_cluster(len) != 0 {
            return Err(Error::Invalid(format!(
                "VM state of {len} bytes at {offset:#x} is not made of whole clusters"
            )));
        }
        self.check_mappable(offset.saturating_add(len))?;
        let mut done = 0;
        while done < len {
            let want = geometry.clusters((len - done).min(MAX_RUN.max(geometry.cluster_size())));
            let run = {
                let mut meta = self.image.meta();
                meta.check_writable()?;
                meta.trim()?;
                meta.allocate(want, false)?
            };
            let n = geometry.bytes_of(run.count);
            let part = iobuf::slice_write(bufs, done, n);
            let written = self.write_run(run, &part).and_then(|()| self.note(offset + done, run));
            if let Err(e) = written {
                self.image.meta().free_after_error(&[run]);
                return Err(e);
            }
            done += n;
        }
        Ok(())
    }

    fn set_vmstate_size(&mut self, size: u64) {
        self.vm_state_size = size;
    }

    fn cluster_size(&self) -> u64 {
        self.image.geometry.cluster_size()
    }
}

impl SnapshotChange for Create<'_> {
    fn prepare(&mut self) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        self.check_size()?;
        let image = self.image;
        // Requests in flight are before the snapshot point, later ones after it.
        let _held = image.in_flight.exclusive(0..u64::MAX);
        let mut meta = image.meta();
        meta.check_writable()?;
        self.tried = true;
        let mut vm = self.write_vm_tables(&mut meta)?;
        // The table covers the recorded size, also where it ends in parts that were never written.
        let covered = meta.geometry().l1_entries(self.vm_state_size);
        vm.resize(vm.len().max(to_usize(covered)), 0);
        let count = meta.geometry().l1_entries(meta.header.size);
        let disk = tree::plain_entries(&meta.l1, count);
        let added = tree::add_refs(&mut meta, &disk);
        meta.noted(added)?;
        self.taken = Some(disk.clone());
        for (index, entry) in disk.iter().enumerate() {
            if meta.l1[index] != *entry {
                meta.set_l1(index, *entry);
            }
        }
        let mut l1 = [disk, vm].concat();
        // A table without entries would have no place.
        l1.resize(l1.len().max(1), 0);
        let l1_run = write_l1(&mut meta, &l1)?;
        self.own.push(l1_run);
        let mut entries = meta.snapshots.clone();
        entries.push(self.entry(&meta, l1_run, l1.len()));
        self.switch = Some(TableSwitch::write(&mut meta, entries)?);
        // Counts, tables and data are durable before the active tables lose their flags, and those
        // before anything refers to the snapshot.
        meta.sync()?;
        self.stage = Stage::Prepared;
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Prepared)?;
        if let Some(switch) = &mut self.switch {
            switch.publish(&mut self.image.meta())?;
        }
        self.stage = Stage::Published;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Published)?;
        self.stage = Stage::Ended;
        let mut meta = self.image.meta();
        meta.changing = false;
        let freed = match &mut self.switch {
            Some(switch) => switch.finish(&mut meta),
            None => Ok(()),
        };
        let written = meta.refcounts.write_back();
        meta.truncate_tail();
        freed.and(written)
    }

    fn rollback(&mut self) -> Result<()> {
        if self.stage == Stage::Ended {
            return Ok(());
        }
        let image = self.image;
        let held = image.in_flight.exclusive(0..u64::MAX);
        let mut meta = image.meta();
        if let Some(switch) = &mut self.switch
            && let Err(e) = switch.undo(&mut meta)
        {
            // The header on disk may have the snapshot: all clusters are kept.
            self.stage = Stage::Ended;
            meta.changing = false;
            return Err(e);
        }
        let freed = self.give_back(&mut meta);
        self.stage = Stage::Ended;
        meta.changing = false;
        let synced = meta.sync();
        drop((meta, held));
        image.give_space_back();
        freed.and(synced)
    }
}

impl Drop for Create<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.rollback() {
            tracing::error!("a snapshot was not undone wholly: {e}");
        }
    }
}
