//! Walks over everything below an L1 table, to take or give back one reference to each cluster.
//!
//! A walk reads each L2 table once, past the cache, and changes the refcounts of runs of clusters in
//! memory; it needs a table's worth of memory, however large the image is.
//!
//! **Order.** Counts and COPIED flags of the active disk change together, by a switch to other tables
//! (`meta/switch.rs`), which the next sync makes.

use std::ops::Range;

use crate::num::{be64, to_usize};
use crate::qcow2::Qcow2;
use crate::qcow2::layout::{
    COPIED, Geometry, HostCluster, HostOffset, Mapping, OFFSET_MASK, Run, push_run, table_of,
};
use crate::qcow2::meta::Meta;
use crate::{ReadBuf, Result};

/// The clusters that an L2 table refers to, in runs; a cluster comes as often as it is referred to.
/// The error is an entry that breaks a rule, and which.
fn runs_in(table: &[u8], geometry: Geometry) -> std::result::Result<Vec<Run>, String> {
    let mut runs = Vec::new();
    for words in table.chunks_exact(8 * geometry.entry_words()) {
        let entry = be64(words, 0);
        match Mapping::decode(entry, geometry) {
            Ok(mapping) => {
                if let Some(run) = mapping.run(geometry) {
                    push_run(&mut runs, run);
                }
            }
            Err(reason) => return Err(format!("L2 entry {entry:#x}: {reason}")),
        }
    }
    Ok(runs)
}

/// As [`runs_in`], with the error for what an L2 table of an image has wrong.
pub(super) fn checked_runs(meta: &Meta, table: &[u8]) -> Result<Vec<Run>> {
    runs_in(table, meta.geometry()).map_err(|reason| meta.damaged(reason))
}

/// The clusters that the L2 table of an L1 entry refers to, as [`runs_in`].
pub(in crate::qcow2) fn runs_of(meta: &mut Meta, l1_entry: u64) -> Result<Vec<Run>> {
    let mut table = Vec::new();
    match meta.copy_l2(l1_entry, &mut table)? {
        Some(_) => checked_runs(meta, &table),
        None => Ok(Vec::new()),
    }
}

/// Takes one more reference to all L2 tables and clusters below `l1`, which is a snapshot's; all or
/// none. COPIED flags, which only a foreign image has there, go too.
pub(super) fn add_refs(meta: &mut Meta, l1: &[u64]) -> Result<()> {
    let mut table = Vec::new();
    let mut flagged = Vec::new();
    for (index, entry) in l1.iter().enumerate() {
        match add_table(meta, *entry, &mut table) {
            Ok(false) => {}
            Ok(true) => flagged.push(*entry),
            Err(e) => {
                undo_add(meta, &l1[..index]);
                return Err(e);
            }
        }
    }
    let cleared = clear_flags(meta, &flagged, &mut table);
    if cleared.is_err() {
        undo_add(meta, l1);
    }
    cleared
}

fn undo_add(meta: &mut Meta, l1: &[u64]) {
    if let Err(undo) = sub_refs(meta, l1) {
        tracing::warn!(image = meta.storage.name(), "clusters are leaked: {undo}");
    }
}

/// Takes the references of one table; says whether it has COPIED flags.
fn add_table(meta: &mut Meta, l1_entry: u64, table: &mut Vec<u8>) -> Result<bool> {
    let geometry = meta.geometry();
    let Some(offset) = meta.copy_l2(l1_entry, table)? else {
        return Ok(false);
    };
    let mut runs = checked_runs(meta, table)?;
    runs.push(meta.cluster_run(offset));
    for (done, run) in runs.iter().enumerate() {
        if let Err(e) = meta.add_refs(*run) {
            meta.free_after_error(&runs[..done]);
            return Err(e);
        }
    }
    let mut flags = table.iter().step_by(8 * geometry.entry_words());
    Ok(flags.any(|first| first & 0x80 != 0))
}

/// Takes the COPIED flags out of a snapshot's L2 tables. Order: counts durable, then the flags.
fn clear_flags(meta: &mut Meta, l1: &[u64], table: &mut Vec<u8>) -> Result<()> {
    if l1.is_empty() {
        return Ok(());
    }
    meta.put_counts()?;
    meta.storage.flush()?;
    let step = 8 * meta.geometry().entry_words();
    for entry in l1 {
        let Some(offset) = meta.copy_l2(*entry, table)? else {
            continue;
        };
        let mut changed = Changed::default();
        for (at, words) in table.chunks_exact_mut(step).enumerate() {
            if words[0] & 0x80 != 0 {
                words[0] &= 0x7f;
                changed.note(at * step);
            }
        }
        if let Some(range) = changed.0 {
            meta.put_l2(offset, table, range)?;
        }
    }
    Ok(())
}

/// The bytes of a table that changed.
#[derive(Default)]
struct Changed(Option<Range<usize>>);

impl Changed {
    /// The entry at `at` did.
    fn note(&mut self, at: usize) {
        let start = self.0.as_ref().map_or(at, |range| range.start);
        self.0 = Some(start..at + 8);
    }
}

/// Gives one reference to all L2 tables and clusters below `l1` back, none of which the active disk
/// has alone afterwards. Nothing on disk may refer to `l1` any more. After an error the rest is
/// tried all the same; what fails is leaked.
pub(super) fn sub_refs(meta: &mut Meta, l1: &[u64]) -> Result<()> {
    let pass = meta.pass_discard.snapshot;
    let mut table = Vec::new();
    let mut result = Ok(());
    for entry in l1 {
        let done = give_table_back(meta, *entry, &mut table, &|meta: &mut Meta, run| {
            meta.free_passing(run, pass)
        });
        // What keeps an image that is damaged from giving space back is told by the walk.
        let punched = meta.punch_if_many();
        result = result.and(done).and(punched);
    }
    result
}

fn give_table_back(
    meta: &mut Meta,
    l1_entry: u64,
    table: &mut Vec<u8>,
    one: &impl Fn(&mut Meta, Run) -> Result<()>,
) -> Result<()> {
    let Some(offset) = meta.copy_l2(l1_entry, table)? else {
        return Ok(());
    };
    for run in checked_runs(meta, table)? {
        one(meta, run)?;
    }
    one(meta, meta.cluster_run(offset))
}

/// Gives one reference to the L2 table of an L1 entry, and to all below it, back. Clusters may be the active
/// disk's alone afterwards: [`set_copied_below`] must follow before others see the tables.
pub(super) fn unshare(meta: &mut Meta, l1_entry: u64) -> Result<()> {
    give_table_back(meta, l1_entry, &mut Vec::new(), &Meta::unshare)
}

/// Gives the references of a deleted snapshot back, table by table, with requests and flushes let in between.
/// After an error the rest is tried all the same; what fails is leaked.
///
/// **Order.** Nothing on disk refers to `l1` any more. The counts below a table change in one step with the
/// COPIED flags of the active disk's table of the same index, the only one that can map the same clusters: who
/// comes in between, a sync among them, finds counts and flags that agree. What is free then may be
/// taken at once: on disk it stays counted until a sync, which comes before references to it.
pub(super) fn unshare_by_table(image: &Qcow2, l1: &[u64]) -> Result<()> {
    by_table(image, l1, |meta, index, runs| {
        let given = runs.into_iter().try_for_each(|run| meta.unshare(run));
        let copied = set_copied_below(meta, index);
        given.and(copied)
    })
}

/// As [`unshare_by_table`], of a disk that was left and has nothing in common with the active one but what
/// snapshots have too.
pub(super) fn sub_refs_by_table(image: &Qcow2, l1: &[u64]) -> Result<()> {
    by_table(image, l1, |meta, _, runs| {
        let pass = meta.pass_discard.snapshot;
        runs.into_iter().try_for_each(|run| meta.free_passing(run, pass))
    })
}

/// Gives `step` each table's index and what it has references to, the table itself last.
fn by_table(
    image: &Qcow2,
    l1: &[u64],
    step: impl Fn(&mut Meta, usize, Vec<Run>) -> Result<()>,
) -> Result<()> {
    let mut table = Vec::new();
    let mut one = |index, entry| {
        let Some(place) = copy_kept(image, entry, &mut table)? else {
            return Ok(());
        };
        let mut meta = image.meta();
        // Damage may have been found meanwhile: counts may be wrong then.
        meta.check_sound()?;
        let mut runs = checked_runs(&meta, &table)?;
        runs.push(meta.cluster_run(place));
        step(&mut meta, index, runs)
    };
    let mut result = Ok(());
    for (index, entry) in l1.iter().enumerate() {
        result = result.and(one(index, *entry));
        image.punch_if_many();
        image.give_way();
    }
    result
}

/// As [`Meta::copy_l2`], of a table that is not the active disk's alone, with no lock held while it is read: nobody
/// changes it as long as the reference to it is there.
fn copy_kept(image: &Qcow2, l1_entry: u64, to: &mut Vec<u8>) -> Result<Option<HostOffset>> {
    let place = {
        let mut meta = image.meta();
        match table_of(l1_entry) {
            Some(place) if meta.geometry().in_cluster(place.0) == 0 && !meta.has_l2(place) => place,
            _ => return meta.copy_l2(l1_entry, to),
        }
    };
    to.resize(to_usize(image.geometry.cluster_size()), 0);
    image.storage.read_at(place.0, &[ReadBuf::new(to)])?;
    Ok(Some(place))
}

/// Sets the COPIED flags of the active disk after references went away: an entry has the flag if
/// its cluster has exactly one reference. Tables whose flags change move (`meta/switch.rs`). After an
/// error the next sync tries again.
pub(in crate::qcow2) fn set_copied(meta: &mut Meta) -> Result<()> {
    let result = set_all_copied(meta);
    meta.flags_lag = result.is_err();
    result
}

fn set_all_copied(meta: &mut Meta) -> Result<()> {
    // A data file of its own has no counts; what is there is always the disk's alone.
    if meta.geometry().external {
        return Ok(());
    }
    let mut table = Vec::new();
    for index in 0..meta.l1.len() {
        set_table_copied(meta, index, &mut table)?;
    }
    Ok(())
}

/// As [`set_copied`], table by table, with requests and flushes let in between.
pub(super) fn set_copied_by_table(image: &Qcow2) -> Result<()> {
    let mut index = 0;
    loop {
        {
            let mut meta = image.meta();
            if index >= meta.l1.len() {
                return Ok(());
            }
            set_copied_below(&mut meta, index)?;
        }
        index += 1;
        image.give_way();
    }
}

/// As [`set_copied`], of the table of an L1 index.
pub(super) fn set_copied_below(meta: &mut Meta, index: usize) -> Result<()> {
    if meta.geometry().external || index >= meta.l1.len() {
        return Ok(());
    }
    let result = set_table_copied(meta, index, &mut Vec::new());
    meta.flags_lag |= result.is_err();
    result
}

fn set_table_copied(meta: &mut Meta, index: usize, table: &mut Vec<u8>) -> Result<()> {
    let geometry = meta.geometry();
    let entry = meta.l1[index];
    let Some(offset) = meta.copy_l2(entry, table)? else {
        return Ok(());
    };
    // The entries that have flags, and their clusters.
    let step = 8 * geometry.entry_words();
    let mut places = Vec::new();
    let mut clusters: Vec<HostCluster> = Vec::new();
    for (index, words) in table.chunks_exact(step).enumerate() {
        if let Ok(Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. }) =
            Mapping::decode(be64(words, 0), geometry)
        {
            places.push(index * step);
            clusters.push(geometry.cluster_of(host));
        }
    }
    let single = meta.refcounts.single(&clusters)?;
    let mut changed = false;
    for (at, single) in places.into_iter().zip(single) {
        let flag = if single { 0x80 } else { 0 };
        changed |= table[at] & 0x80 != flag;
        table[at] = table[at] & 0x7f | flag;
    }
    let own = meta.refcounts.get(geometry.cluster_of(offset))? == 1;
    if changed || own != (entry & COPIED != 0) {
        // The copy is the disk's alone, whoever has the old one.
        meta.move_l2(index, table, COPIED)?;
    }
    Ok(())
}

/// The first `count` entries of an L1 table without flags, padded with empty ones.
pub(super) fn plain_entries(l1: &[u64], count: u64) -> Vec<u64> {
    let mut entries: Vec<u64> =
        l1.iter().take(to_usize(count)).map(|entry| entry & OFFSET_MASK).collect();
    entries.resize(to_usize(count), 0);
    entries
}
