//! Tables in new places, made valid by one header write.
//!
//! An entry of the active tables has the COPIED flag if, and only if, its cluster has one reference. A snapshot
//! that is made or deleted changes many counts from 1 to 2 or back, and the flags with them, in
//! different clusters: written in place, a crash in between would leave what a check calls wrong. So
//! all of it goes to clusters that nothing on disk refers to: the refcount blocks with such counts,
//! the refcount table, the L2 tables with such flags, the L1 table. Bytes 24 to 72 of the header give
//! the places of both tables. They lie in one sector, which a disk writes wholly or not at all.
//!
//! **Order of writes** ([`Meta::switch`], as step 1 of a sync):
//!
//! 1. blocks, refcount table, L2 tables and L1 table in their new places, other blocks in place;
//! 2. flush: these, guest data and counts are durable;
//! 3. the header, flush;
//! 4. the old places are given back at the end of the sync.
//!
//! Before step 3 the old tables are whole: what changes in place has counts that only go up, or down
//! for clusters that nothing on disk refers to. After it the new ones are. Either way a crash leaves
//! leaks. A failure before step 3 leaves the new tables in memory, and the next sync tries again; one
//! in step 3 leaves the header in doubt, and the next sync writes it first ([`Meta::settle`]).

use std::collections::HashSet;

use crate::num::be_bytes;
use crate::qcow2::header::field;
use crate::qcow2::layout::{COPIED, HostOffset, Run, table_of};
use crate::{Result, WriteBuf};

use super::Meta;

impl Meta {
    /// Whether the next sync switches tables.
    pub(crate) fn is_switching(&self) -> bool {
        self.refcounts.is_moving() || self.next_l1.is_some()
    }

    /// Adds a reference to each cluster; entries of the active tables that lose COPIED flags by it
    /// must move ([`Meta::move_l2`]).
    pub(crate) fn share(&mut self, run: Run) -> Result<()> {
        self.move_blocks(run, 1)?;
        self.add_refs(run)
    }

    /// Takes a reference from each cluster of a snapshot; entries of the active tables that get COPIED
    /// flags by it must move.
    pub(crate) fn unshare(&mut self, run: Run) -> Result<()> {
        self.move_blocks(run, 2)?;
        self.free_passing(run, self.pass_discard.snapshot)
    }

    /// Moves the refcount blocks in which a cluster of a run has `count` references.
    fn move_blocks(&mut self, run: Run, count: u64) -> Result<()> {
        let found = self.refcounts.unmoved_with(run, count);
        for index in self.noted(found)? {
            self.move_refcount_table()?;
            let to = self.allocate(1, true)?;
            match self.refcounts.move_block(index, to.first) {
                Ok(from) => self.defer_free(Run::one(from)),
                Err(e) => {
                    self.free_after_error(&[to]);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn move_refcount_table(&mut self) -> Result<()> {
        if self.refcounts.is_moving() {
            return Ok(());
        }
        let to = self.allocate(self.refcounts.table_run().count, true)?;
        // The table may have had to grow for that, which moves it too.
        if self.refcounts.is_moving() {
            return self.free(to);
        }
        self.refcounts.move_table(to);
        Ok(())
    }

    fn move_l1(&mut self) -> Result<()> {
        if self.next_l1.is_none() {
            self.next_l1 = Some(self.allocate(self.l1_run().count, true)?);
        }
        Ok(())
    }

    /// Makes `bytes` the L2 table of an L1 index, in a new place, and the L1 entry refer to it with the
    /// flags given. The old place is given back by the next sync.
    pub(crate) fn move_l2(&mut self, index: usize, bytes: &[u8], flags: u64) -> Result<Run> {
        self.move_l1()?;
        let to = self.allocate(1, true)?;
        let place = self.geometry().offset_of(to.first);
        let old = self.l1.get(index).copied().and_then(table_of);
        match old.filter(|old| self.l2.contains(*old)) {
            Some(old) => {
                self.l2.forget(old);
                self.l2.insert(place, bytes.to_vec());
            }
            // A walk over a large disk shall not fill the cache.
            None => {
                if let Err(e) = self.storage.write_at(place.0, &[WriteBuf::new(bytes)]) {
                    self.free_after_error(&[to]);
                    return Err(e);
                }
            }
        }
        if let Some(old) = old {
            self.defer_free(self.cluster_run(old));
        }
        self.point_follows(index, place);
        self.set_l1(index, place.0 | flags);
        Ok(to)
    }

    /// The changes so far go with the switch: an old version of a table could have entries whose flags
    /// do not fit the new counts.
    fn move_dirty(&mut self) -> Result<()> {
        let dirty: HashSet<HostOffset> = self.l2.dirty_in_place().into_iter().collect();
        for index in 0..if dirty.is_empty() { 0 } else { self.l1.len() } {
            let entry = self.l1[index];
            let here = table_of(entry).filter(|at| dirty.contains(at));
            if let Some(table) = here.and_then(|at| self.l2.peek(at)) {
                let bytes = table.bytes().to_vec();
                self.move_l2(index, &bytes, entry & COPIED)?;
            }
        }
        if self.l1_dirty.is_some() { self.move_l1() } else { Ok(()) }
    }

    /// Makes the prepared tables the valid ones; the module has the steps.
    pub(super) fn switch(&mut self) -> Result<()> {
        self.write_switch()?;
        self.storage.flush()?;
        self.adopt_switch();
        self.settle()
    }

    /// Step 1 of the module's order.
    pub(super) fn write_switch(&mut self) -> Result<()> {
        if self.refcounts.has_moved_blocks()
            && let Err(e) = self.move_dirty()
        {
            // They are written in place afterwards, as they would be without a switch.
            tracing::debug!(image = self.storage.name(), "tables stay where they are: {e}");
        }
        self.refcounts.write_moved()?;
        if let Some(run) = self.next_l1 {
            self.l2.write_fresh(&*self.storage)?;
            let at = self.geometry().offset_of(run.first).0;
            self.storage.write_at(at, &[WriteBuf::new(&be_bytes(&self.l1))])?;
        }
        Ok(())
    }

    /// The new places are those in force, as far as memory is concerned: the header must follow
    /// ([`Meta::settle`]).
    pub(super) fn adopt_switch(&mut self) {
        if let Some(old) = self.refcounts.adopt() {
            self.defer_free(old);
        }
        if let Some(run) = self.next_l1.take() {
            self.defer_free(self.l1_run());
            self.header.l1_offset = self.geometry().offset_of(run.first).0;
            self.l1_dirty = None;
        }
        self.unsettled = true;
    }

    /// Makes the header tell of the tables in force, where it may tell of others. Those are whole on
    /// disk too, so this may come before all other writes; it must, because these go to the tables in
    /// force.
    pub(super) fn settle(&mut self) -> Result<()> {
        if !self.unsettled {
            return Ok(());
        }
        self.write_places()?;
        self.storage.flush()?;
        self.unsettled = false;
        Ok(())
    }

    /// Writes the places of the tables in force to the header.
    pub(super) fn write_places(&self) -> Result<()> {
        let header = &self.header;
        let (refcounts, clusters) = self.refcounts.place();
        let snapshots = self.snapshot_table.map_or(0, |run| self.geometry().offset_of(run.first).0);
        let count = u32::try_from(self.snapshots.len()).unwrap_or(u32::MAX);
        // One write within one sector. Bytes 32 to 36 are the encryption method: none.
        let mut fields = [0; 48];
        fields[..8].copy_from_slice(&header.size.to_be_bytes());
        fields[12..16].copy_from_slice(&header.l1_size.to_be_bytes());
        fields[16..24].copy_from_slice(&header.l1_offset.to_be_bytes());
        fields[24..32].copy_from_slice(&refcounts.to_be_bytes());
        fields[32..36].copy_from_slice(&clusters.to_be_bytes());
        fields[36..40].copy_from_slice(&count.to_be_bytes());
        fields[40..].copy_from_slice(&snapshots.to_be_bytes());
        self.write_field(field::SIZE, &fields)
    }
}
