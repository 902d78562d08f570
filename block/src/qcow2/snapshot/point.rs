//! The snapshot point: from [`Meta::pass_point`] on, what the active disk has is the snapshot's too.
//!
//! That changes memory only: it notes the L1 entries, and that the references which the snapshot
//! needs below each of them are *owed*. They are taken table by table, by whoever comes first: a guest's
//! request that wants to change the table ([`Meta::l2_for_write`]), or `prepare`.
//!
//! ```text
//!              ┌── table with COPIED flags ──> moved:  the snapshot keeps the table, the active disk
//!  owed ──take─┤                                       has a copy without flags
//!              └── without any ──────────────> shared: both have the table
//! ```
//!
//! Either way each cluster below gets one more reference. While a table is owed nobody changes what it
//! maps, and none of the clusters below counts as the active disk's alone, whatever flags it has
//! ([`Meta::cluster`]). A sync may move it (`meta/switch.rs`): then the snapshot's is the moved one
//! ([`Meta::point_follows`]).
//!
//! **Order.** Counts that go from 1 to 2 are a matter of `meta/switch.rs`, as are the L1 entries of
//! copies. Nothing on disk refers to the snapshot before all is taken, durably. Until then a crash
//! leaves the active disk: an L1 entry refers to the old table, or, once a sync has made counts and
//! copy durable, to the copy. References that were taken are leaks then.
//!
//! A guest's request never fails because of the snapshot: where references cannot be taken the snapshot
//! has failed, the active disk owns what is still owed again, and `prepare` tells why.

use crate::num::{to_u64, to_usize};
use crate::qcow2::Qcow2;
use crate::qcow2::layout::{COPIED, Geometry, HostOffset, Run, table_of};
use crate::qcow2::meta::Meta;
use crate::{Error, ReadBuf, Result, WriteBuf};

use super::tree;

/// How far the references below an L1 entry are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Share {
    /// No table, or the snapshot has failed.
    Nothing,
    Owed,
    Moved,
    Shared,
}

/// A snapshot point.
#[derive(Debug)]
pub(in crate::qcow2) struct Point {
    /// The disk's L1 table at that time, without flags.
    l1: Vec<u64>,
    shares: Vec<Share>,
    /// Why the snapshot cannot be made any more.
    failed: Option<String>,
}

impl Point {
    /// The L1 table at that time, without flags.
    pub(super) fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// The error of a snapshot whose references could not be taken.
    pub(super) fn check(&self) -> Result<()> {
        match &self.failed {
            Some(reason) => Err(Error::NotSupported(format!(
                "The snapshot failed when the disk was written to: {reason}"
            ))),
            None => Ok(()),
        }
    }

    fn fail(&mut self, error: &Error) {
        self.failed.get_or_insert_with(|| error.to_string());
        for share in self.shares.iter_mut().filter(|share| **share == Share::Owed) {
            *share = Share::Nothing;
        }
    }
}

/// Takes the flags out of a table; says whether there were any.
fn strip(table: &mut [u8], geometry: Geometry) -> bool {
    let mut had = false;
    for words in table.chunks_exact_mut(8 * geometry.entry_words()) {
        had |= words[0] & 0x80 != 0;
        words[0] &= 0x7f;
    }
    had
}

impl Meta {
    /// The snapshot point. Requests must be drained.
    pub(super) fn pass_point(&mut self) -> Result<()> {
        self.check_writable()?;
        if self.point.is_some() {
            return Err(Error::Invalid("The snapshot point was passed already".to_owned()));
        }
        let l1 = tree::plain_entries(&self.l1, self.geometry().l1_entries(self.header.size));
        let share = |entry: &u64| if *entry == 0 { Share::Nothing } else { Share::Owed };
        let shares = l1.iter().map(share).collect();
        self.point = Some(Point { l1, shares, failed: None });
        Ok(())
    }

    /// Whether a snapshot's references below an L1 entry of the active table are still to be taken.
    pub(in crate::qcow2) fn owes(&self, l1_index: u64) -> bool {
        let share = |point: &Point| point.shares.get(to_usize(l1_index)).copied();
        self.point.as_ref().and_then(share) == Some(Share::Owed)
    }

    /// As [`Meta::owes`], for any table that maps a part of a guest range.
    pub(in crate::qcow2) fn owes_any(&self, guest: u64, len: u64) -> bool {
        let geometry = self.geometry();
        let last = guest + len.saturating_sub(1);
        self.point.is_some()
            && (geometry.l1_index(guest)..=geometry.l1_index(last)).any(|index| self.owes(index))
    }

    /// The active disk's table of an L1 index goes to another place: while it is owed, it is the
    /// snapshot's too.
    pub(in crate::qcow2) fn point_follows(&mut self, index: usize, place: HostOffset) {
        if self.owes(to_u64(index))
            && let Some(slot) = self.point.as_mut().and_then(|point| point.l1.get_mut(index))
        {
            *slot = place.0;
        }
    }

    /// Before the active disk changes a table: takes what is owed below it, or gives the snapshot up.
    pub(in crate::qcow2) fn pay(&mut self, l1_index: u64) {
        if !self.owes(l1_index) {
            return;
        }
        if let Err(e) = self.take_table(to_usize(l1_index))
            && let Some(point) = &mut self.point
        {
            tracing::warn!(image = self.storage.name(), "a snapshot being made has failed: {e}");
            point.fail(&e);
        }
    }

    /// Takes what is owed below an L1 entry.
    fn take_table(&mut self, index: usize) -> Result<()> {
        let mut table = Vec::new();
        let Some(offset) = self.copy_l2(self.l1[index], &mut table)? else {
            return Ok(());
        };
        let runs = tree::checked_runs(self, &table)?;
        // What is not on disk yet goes with the active disk's L1 table.
        if !strip(&mut table, self.geometry()) && !self.is_l2_dirty(offset) {
            return self.take_shared(index, offset, &runs);
        }
        let copy = self.allocate(1, true)?;
        if let Err(e) = self.take_moved(index, copy, &runs) {
            self.free_after_error(&[copy]);
            return Err(e);
        }
        let place = self.geometry().offset_of(copy.first);
        self.put_new_l2(place, table);
        Ok(())
    }

    /// Gives the snapshot a reference to the table too. The active disk copies it before it changes it.
    fn take_shared(&mut self, index: usize, table: HostOffset, runs: &[Run]) -> Result<()> {
        let table = self.cluster_run(table);
        self.share_all(runs)?;
        if let Err(e) = self.share(table) {
            self.free_after_error(runs);
            return Err(e);
        }
        let entry = self.l1[index];
        if entry & COPIED != 0 {
            self.set_l1(index, entry & !COPIED);
        }
        self.set_share(index, Share::Shared);
        Ok(())
    }

    /// Leaves a table to the snapshot, and has the active disk use a copy of it without flags.
    fn take_moved(&mut self, index: usize, copy: Run, runs: &[Run]) -> Result<()> {
        self.share_all(runs)?;
        let place = self.geometry().offset_of(copy.first);
        self.set_l1(index, place.0 | COPIED);
        self.set_share(index, Share::Moved);
        Ok(())
    }

    /// Adds a reference to each cluster of runs; all or none.
    fn share_all(&mut self, runs: &[Run]) -> Result<()> {
        for (done, run) in runs.iter().enumerate() {
            if let Err(e) = self.share(*run) {
                self.free_after_error(&runs[..done]);
                return Err(e);
            }
        }
        Ok(())
    }

    fn set_share(&mut self, index: usize, share: Share) {
        if let Some(slot) = self.point.as_mut().and_then(|point| point.shares.get_mut(index)) {
            *slot = share;
        }
    }

    /// Gives back a table that moved with what is below; at once if nothing on disk refers to it.
    fn give_moved_back(&mut self, entry: u64, at_once: bool) -> Result<()> {
        for run in tree::runs_of(self, entry)? {
            self.unshare(run)?;
        }
        match table_of(entry).map(|table| self.cluster_run(table)) {
            Some(run) if at_once => self.free_passing(run, self.pass_discard.snapshot),
            Some(run) => {
                self.defer_free(run);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Ends a snapshot point without a snapshot: what was taken is given back, and the active disk, which stays
/// as it is, gets its COPIED flags again. What fails is leaked.
///
/// Table by table, with requests and flushes let in between: after each, counts and flags below it agree.
pub(super) fn give_back(image: &Qcow2) -> Result<()> {
    let mut meta = image.meta();
    let Some(point) = meta.point.take() else {
        return Ok(());
    };
    // Tables that moved may be those of the disk's L1 table on disk. After a sync they are free at
    // once, and the disk's tables find their places again.
    let moved = point.shares.contains(&Share::Moved);
    let current = match moved {
        true => image.freeze(meta).sync().is_ok(),
        false => {
            drop(meta);
            false
        }
    };
    let mut result = Ok(());
    for (index, (entry, share)) in point.l1.iter().zip(point.shares).enumerate() {
        let mut meta = image.meta();
        let done = match share {
            Share::Nothing | Share::Owed => continue,
            Share::Shared => tree::unshare(&mut meta, *entry),
            Share::Moved => meta.give_moved_back(*entry, current),
        };
        let copied = tree::set_copied_below(&mut meta, index);
        drop(meta);
        result = result.and(done).and(copied);
        image.punch_if_many();
        image.give_way();
    }
    result
}

/// Takes all that is still owed, letting requests in between. Tables are read, and copies of them
/// written, with no lock held.
pub(super) fn take_all(image: &Qcow2) -> Result<()> {
    let tables = image.meta().point.as_ref().map_or(0, |point| point.l1.len());
    for index in 0..tables {
        while !take_one(image, index)? {}
        if let Some(point) = &image.meta().point {
            point.check()?;
        }
        image.give_way();
    }
    Ok(())
}

/// Takes what is owed below an L1 entry. Says no if the table went elsewhere meanwhile.
fn take_one(image: &Qcow2, index: usize) -> Result<bool> {
    let place = {
        let mut meta = image.meta();
        meta.check_writable()?;
        meta.trim_new()?;
        match owed_table(&meta, index) {
            None => return Ok(true),
            Some(place) if !meta.has_l2(place) => place,
            Some(_) => {
                let taken = meta.take_table(index);
                return meta.noted(taken).map(|()| true);
            }
        }
    };
    let mut table = vec![0; to_usize(image.geometry.cluster_size())];
    image.storage.read_at(place.0, &[ReadBuf::new(&mut table)])?;
    let (runs, copy) = {
        let mut meta = image.meta();
        if owed_table(&meta, index) != Some(place) {
            return Ok(false);
        }
        let runs = tree::checked_runs(&meta, &table);
        let runs = meta.noted(runs)?;
        if !strip(&mut table, image.geometry) {
            return meta.take_shared(index, place, &runs).map(|()| true);
        }
        (runs, meta.allocate(1, true)?)
    };
    // Nothing refers to the copy until it is there.
    let at = image.geometry.offset_of(copy.first).0;
    let written = image.storage.write_at(at, &[WriteBuf::new(&table)]);
    let mut meta = image.meta();
    let taken = written.and_then(|()| match owed_table(&meta, index) == Some(place) {
        true => meta.take_moved(index, copy, &runs).map(|()| true),
        false => Ok(false),
    });
    if !matches!(taken, Ok(true)) {
        meta.free_after_error(&[copy]);
    }
    taken
}

/// The place of a table below which references are owed.
fn owed_table(meta: &Meta, index: usize) -> Option<HostOffset> {
    let owed = meta.owes(to_u64(index));
    meta.l1.get(index).copied().filter(|_| owed).and_then(table_of)
}
