//! The VM-state area of a snapshot being made.
//!
//! ```text
//!            write                         write (in place)
//!  empty ───────────────> own <──────────────┐
//!    ^                    │ │ └──────────────┘
//!    │  zero (given back) │ │
//!    ├────────────────────┘ │ write: the rest of the cluster is copied
//!    └───────────────── inherited
//!            zero
//! ```
//!
//! *Own* clusters were taken for this snapshot; *packed* ones are own clusters that are stored compressed,
//! and get another place whenever they are written. *Inherited* ones are an earlier snapshot's and are only
//! looked at until [`Area::take`]. Nothing on disk refers to the area before the snapshot is published,
//! so no write here has an order to keep. `take` has: see there.
//!
//! Locks: the area's, then the metadata mutex. Neither is held while VM state is transferred.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::num::{be_bytes, to_u64, to_usize};
use crate::qcow2::Qcow2;
use crate::qcow2::header::MAX_L1_BYTES;
use crate::qcow2::layout::{Run, push_run, table_of};
use crate::qcow2::meta::Meta;
use crate::snapshot::VmStateRead;
use crate::{Error, Result};

use super::vmstate::VmState;
use super::{tree, write_fresh};

mod packed;
mod table;
mod write;

use table::{Slot, Table};

#[derive(Debug, Default)]
struct State {
    /// Tables that differ from the earlier snapshot's, by their index from the start of the area.
    tables: BTreeMap<u64, Table>,
    /// Own clusters.
    written: u64,
    /// Host offset up to which file space is taken.
    reserved: u64,
    /// Bytes that packing made of less.
    spared: u64,
}

/// What [`Area::take`] took besides own clusters.
#[derive(Debug, Default)]
struct Taken {
    /// Clusters of tables.
    tables: Vec<Run>,
    /// Inherited clusters below these tables.
    inherited: Vec<Run>,
    /// L1 entries of whole tables that are shared.
    shared: Vec<u64>,
}

/// The VM-state area of a snapshot that is being made.
pub(super) struct Area<'a> {
    image: &'a Qcow2,
    base: Option<VmState<'a>>,
    state: Mutex<State>,
    taken: Taken,
    /// Whether clusters that are written whole are compressed.
    pub(super) compress: bool,
}

impl<'a> Area<'a> {
    /// An area of zeroes.
    pub(super) fn new(image: &'a Qcow2) -> Self {
        let (state, taken) = (Mutex::default(), Taken::default());
        Self { image, base: None, state, taken, compress: false }
    }

    /// Starts with the area of snapshot `id`; gives its length in bytes.
    pub(super) fn inherit(&mut self, id: &str) -> Result<u64> {
        if self.base.is_some() || !self.state().tables.is_empty() {
            return Err(Error::Invalid(
                "VM state can be inherited once, before any is written".to_owned(),
            ));
        }
        let base = VmState::open(self.image, id)?;
        self.check_mappable(base.size())?;
        let size = base.size();
        self.base = Some(base);
        Ok(size)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Which table a cluster of the area is in, and where.
    fn index_of(&self, cluster: u64) -> (u64, usize) {
        let geometry = self.image.geometry;
        (cluster >> geometry.l2_bits(), to_usize(cluster & (geometry.l2_entries() - 1)))
    }

    /// The base's L1 entry for a table of the area; 0 past what it recorded.
    fn base_entry(&self, table: u64) -> u64 {
        let base = self.base.as_ref();
        base.filter(|base| table < self.image.geometry.l1_entries(base.size()))
            .map_or(0, |base| base.l1_entry(table))
    }

    /// Copies a table of the base, unless it is here. What it has past the recorded size is nothing.
    fn load<'s>(&self, state: &'s mut State, table: u64) -> Result<Option<&'s mut Table>> {
        use std::collections::btree_map::Entry;
        let geometry = self.image.geometry;
        let entry = match state.tables.entry(table) {
            Entry::Occupied(entry) => return Ok(Some(entry.into_mut())),
            Entry::Vacant(entry) => entry,
        };
        let l1_entry = self.base_entry(table);
        if l1_entry == 0 {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        if self.image.meta().copy_l2(l1_entry, &mut bytes)?.is_none() {
            return Ok(None);
        }
        let mut new = Table::empty(geometry);
        let stored = geometry.clusters(self.base.as_ref().map_or(0, VmStateRead::size));
        let first = table << geometry.l2_bits();
        let kept = to_usize(stored.saturating_sub(first).min(geometry.l2_entries()));
        new.inherit(&bytes, kept, geometry);
        Ok(Some(entry.insert(new)))
    }

    /// A table that [`Area::slot`] looked at, for changes; an empty one if there is none.
    fn table_for_write<'s>(&self, state: &'s mut State, table: u64) -> &'s mut Table {
        state.tables.entry(table).or_insert_with(|| Table::empty(self.image.geometry))
    }

    fn slot(&self, state: &mut State, cluster: u64) -> Result<Slot> {
        let geometry = self.image.geometry;
        let (table, index) = self.index_of(cluster);
        let Some(table) = self.load(state, table)? else {
            return Ok(Slot::Empty);
        };
        table.slot(index, geometry).map_err(|reason| self.image.meta().damaged(reason))
    }

    /// Makes the area ready to be recorded with a length of `size` bytes. It may be read from and
    /// written to the file, but takes no reference yet.
    ///
    /// # Errors
    /// Among others if own clusters are past it.
    pub(super) fn settle(&self, size: u64) -> Result<()> {
        let geometry = self.image.geometry;
        self.check_mappable(size)?;
        let stored = self.base.as_ref().map_or(0, VmStateRead::size);
        if stored < size && geometry.in_cluster(stored) != 0 {
            // What the base's last cluster has past its recorded size would show now. One that was
            // written meanwhile has it no more.
            let slot = self.slot(&mut self.state(), stored >> geometry.cluster_bits)?;
            if slot == Slot::Inherited {
                let end = stored.next_multiple_of(geometry.cluster_size());
                self.zero_range(stored, end - stored)?;
            }
        }
        let mut state = self.state();
        // Tables in which the base ends or this ends: entries past the end are left out.
        if geometry.clusters(stored) != geometry.clusters(size) {
            for end in [stored, size] {
                let cluster = geometry.clusters(end);
                if !cluster.is_multiple_of(geometry.l2_entries()) {
                    self.load(&mut state, self.index_of(cluster).0)?;
                }
            }
        }
        let end = geometry.clusters(size);
        for (number, table) in &mut state.tables {
            let first = number << geometry.l2_bits();
            let kept = to_usize(end.saturating_sub(first).min(geometry.l2_entries()));
            if let Some(own) = table.own[kept..].iter().rposition(|own| *own) {
                let written = (first + to_u64(kept + own)) << geometry.cluster_bits;
                return Err(Error::Invalid(format!(
                    "VM-state size {size} is below what was written (up to {written:#x})"
                )));
            }
            for index in kept..table.own.len() {
                table.set(index, None, geometry);
            }
        }
        Ok(())
    }

    /// Takes references to all that is inherited and writes the area's tables to fresh clusters; gives
    /// the L1 entries for `size` bytes. After an error [`Area::give_back`] undoes what was done.
    ///
    /// **Order.** All of it must be durable, counts included, before the header tells of the snapshot.
    /// The base keeps its own references, so that either can be deleted first.
    pub(super) fn take(&mut self, meta: &mut Meta, size: u64) -> Result<Vec<u64>> {
        let geometry = meta.geometry();
        let count = geometry.l1_entries(size);
        let mut l1 = Vec::with_capacity(to_usize(count));
        let mut shared = Vec::new();
        for number in 0..count {
            let entry = self.base_entry(number);
            let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
            let Some(table) = state.tables.get(&number) else {
                let plain = table_of(entry).map_or(0, |at| at.0);
                shared.push(plain);
                l1.push(plain);
                continue;
            };
            if table.words.iter().all(|word| *word == 0) {
                l1.push(0);
                continue;
            }
            let runs = table.inherited_runs(geometry).map_err(|reason| meta.damaged(reason))?;
            for run in runs {
                meta.add_refs(run)?;
                push_run(&mut self.taken.inherited, run);
            }
            let run = write_fresh(meta, be_bytes(&table.words))?;
            self.taken.tables.push(run);
            l1.push(geometry.offset_of(run.first).0);
        }
        tree::add_refs(meta, &shared)?;
        self.taken.shared = shared;
        Ok(l1)
    }

    /// Lets the earlier snapshot go, which may be deleted then. After [`Area::take`], or before
    /// [`Area::give_back`]; not with the metadata mutex held.
    pub(super) fn close(&mut self) {
        self.base = None;
    }

    /// Gives everything back, own clusters included. What fails is leaked.
    pub(super) fn give_back(&mut self, meta: &mut Meta) -> Result<()> {
        let taken = std::mem::take(&mut self.taken);
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        let geometry = meta.geometry();
        let own = state.tables.values().flat_map(|table| table.own_runs(geometry));
        let mut result = tree::sub_refs(meta, &taken.shared);
        for run in taken.tables.into_iter().chain(taken.inherited).chain(own) {
            result = result.and(meta.free(run));
        }
        result
    }
}
