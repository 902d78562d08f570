//! Walks over everything below an L1 table, to take or give back one reference to each cluster.
//!
//! Refcounts change in memory and are written once for all, so a walk costs reading the L2 tables.

use crate::Result;
use crate::num::{to_u64, to_usize};
use crate::qcow2::layout::{COPIED, HostCluster, Mapping, OFFSET_MASK, Run, push_run, table_of};
use crate::qcow2::meta::Meta;

/// The clusters that an L2 table refers to, in runs; a cluster comes as often as it is referred to.
pub(in crate::qcow2) fn runs_of(meta: &mut Meta, l1_entry: u64) -> Result<Vec<Run>> {
    let geometry = meta.geometry();
    let mut runs = Vec::new();
    let mut bad = None;
    if let Some(table) = meta.l2_at(l1_entry)? {
        for index in 0..geometry.l2_entries() {
            let entry = table.entry(index);
            match Mapping::decode(entry, geometry) {
                Ok(mapping) => {
                    if let Some(run) = mapping.run(geometry) {
                        push_run(&mut runs, run);
                    }
                }
                Err(reason) => bad = Some((entry, reason)),
            }
        }
    }
    match bad {
        Some((entry, reason)) => Err(meta.damaged(format!("L2 entry {entry:#x}: {reason}"))),
        None => Ok(runs),
    }
}

/// Takes one more reference to all L2 tables and clusters below `l1`; all or none. No cluster is
/// anyone's alone afterwards, so the L2 tables lose their COPIED flags.
pub(super) fn add_refs(meta: &mut Meta, l1: &[u64]) -> Result<()> {
    for (index, entry) in l1.iter().enumerate() {
        if let Err(e) = add_table(meta, *entry) {
            if let Err(undo) = sub_refs(meta, &l1[..index]) {
                tracing::warn!(image = meta.storage.name(), "clusters are leaked: {undo}");
            }
            return Err(e);
        }
        meta.trim()?;
    }
    Ok(())
}

fn add_table(meta: &mut Meta, l1_entry: u64) -> Result<()> {
    let Some(offset) = table_of(l1_entry) else {
        return Ok(());
    };
    let mut runs = runs_of(meta, l1_entry)?;
    runs.push(meta.cluster_run(offset));
    for (done, run) in runs.iter().enumerate() {
        if let Err(e) = meta.add_refs(*run) {
            meta.free_after_error(&runs[..done]);
            return Err(e);
        }
    }
    let entries = meta.geometry().l2_entries();
    if let Some(table) = meta.l2_at(l1_entry)? {
        for index in 0..entries {
            let entry = table.entry(index);
            if entry & COPIED != 0 {
                table.set_entry(index, entry & !COPIED);
            }
        }
    }
    Ok(())
}

/// Gives one reference to all L2 tables and clusters below `l1` back. Nothing on disk may refer to
/// `l1` any more. After an error the rest is tried all the same; what fails is leaked.
pub(super) fn sub_refs(meta: &mut Meta, l1: &[u64]) -> Result<()> {
    let mut result = Ok(());
    for entry in l1 {
        if let Err(e) = sub_table(meta, *entry).and_then(|()| meta.trim()) {
            result = Err(e);
        }
    }
    result
}

fn sub_table(meta: &mut Meta, l1_entry: u64) -> Result<()> {
    let Some(offset) = table_of(l1_entry) else {
        return Ok(());
    };
    for run in runs_of(meta, l1_entry)? {
        meta.free_passing(run, meta.pass_discard.snapshot)?;
    }
    meta.free_passing(meta.cluster_run(offset), meta.pass_discard.snapshot)
}

/// Sets the COPIED flags of the active disk after references went away: an entry has the flag if
/// its cluster has exactly one reference. After an error the next sync tries again.
pub(in crate::qcow2) fn set_copied(meta: &mut Meta) -> Result<()> {
    let result = set_all_copied(meta);
    meta.flags_lag = result.is_err();
    result
}

fn set_all_copied(meta: &mut Meta) -> Result<()> {
    let geometry = meta.geometry();
    for l1_index in 0..meta.l1.len() {
        let entry = meta.l1[l1_index];
        let Some(offset) = table_of(entry) else {
            continue;
        };
        let wanted = flagged(meta, entry, geometry.cluster_of(offset))?;
        if wanted != entry {
            meta.set_l1(l1_index, wanted);
        }
        let mut entries = Vec::new();
        if let Some(table) = meta.l2_for_read(to_u64(l1_index))? {
            entries.extend((0..geometry.l2_entries()).map(|index| table.entry(index)));
        }
        let mut changes = Vec::new();
        for (index, entry) in entries.into_iter().enumerate() {
            let host = match Mapping::decode(entry, geometry) {
                Ok(Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. }) => host,
                _ => continue,
            };
            let wanted = flagged(meta, entry, geometry.cluster_of(host))?;
            if wanted != entry {
                changes.push((to_u64(index), wanted));
            }
        }
        if let Some(table) = meta.l2_for_read(to_u64(l1_index))? {
            for (index, wanted) in changes {
                table.set_entry(index, wanted);
            }
        }
        meta.trim()?;
    }
    Ok(())
}

fn flagged(meta: &mut Meta, entry: u64, cluster: HostCluster) -> Result<u64> {
    Ok(if meta.refcounts.get(cluster)? == 1 { entry | COPIED } else { entry & !COPIED })
}

/// The first `count` entries of an L1 table without flags, padded with empty ones.
pub(super) fn plain_entries(l1: &[u64], count: u64) -> Vec<u64> {
    let mut entries: Vec<u64> =
        l1.iter().take(to_usize(count)).map(|entry| entry & OFFSET_MASK).collect();
    entries.resize(to_usize(count), 0);
    entries
}
