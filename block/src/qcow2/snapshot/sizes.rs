//! How much of a snapshot is its own: what its deletion would give back.
//!
//! A cluster is the snapshot's alone if all references to it come from the snapshot. The walk looks at
//! one L2 table at a time, past the cache, and lets other requests in between; it needs memory for
//! one table, however large the image is. What the guest has overwritten since the last flush is still
//! counted as shared; while a snapshot is being made or deleted, counts are on their way.

use crate::num::{to_u64, to_usize};
use crate::qcow2::Qcow2;
use crate::qcow2::layout::{HostCluster, Run};
use crate::qcow2::meta::Meta;
use crate::snapshot::{Share, SnapshotSizes};
use crate::{Error, Result};

use super::table::Entry;
use super::tree::checked_runs;
use super::{find, l1_run, load_l1};

/// Counts the clusters of snapshot `id`.
pub(in crate::qcow2) fn sizes(image: &Qcow2, id: &str) -> Result<SnapshotSizes> {
    let (entry, l1) = {
        let meta = image.meta();
        let entry = find(&meta, id)?;
        let l1 = load_l1(&meta, &entry)?;
        (entry, l1)
    };
    let geometry = image.geometry;
    let disk_tables = to_usize(geometry.l1_entries(entry.info.disk_size));
    let mut sizes = SnapshotSizes::default();
    let mut table = Vec::new();
    for (index, l1_entry) in l1.iter().enumerate() {
        let mut meta = image.meta();
        check_still_there(&meta, &entry)?;
        let part = if index < disk_tables { &mut sizes.disk } else { &mut sizes.vm_state };
        count_table(&mut meta, *l1_entry, &mut table, part)?;
    }
    // The L1 table is nobody else's.
    let own = l1_run(&image.meta(), &entry);
    sizes.disk.alone += geometry.bytes_of(own.count);
    Ok(sizes)
}

/// Its tables may be somebody else's clusters once it is deleted.
pub(super) fn check_still_there(meta: &Meta, entry: &Entry) -> Result<()> {
    if meta.snapshots.contains(entry) {
        return Ok(());
    }
    let node = meta.storage.name().to_owned();
    Err(Error::NoSuchSnapshot { tag: entry.info.tag.clone(), node })
}

fn count_table(meta: &mut Meta, l1_entry: u64, table: &mut Vec<u8>, to: &mut Share) -> Result<()> {
    let Some(offset) = meta.copy_l2(l1_entry, table)? else {
        return Ok(());
    };
    let mut clusters: Vec<_> =
        checked_runs(meta, table)?.into_iter().flat_map(Run::clusters).collect();
    clusters.push(meta.geometry().cluster_of(offset));
    // In order, so that a refcount block is looked up for its neighbours, too.
    clusters.sort_unstable();
    for same in clusters.chunk_by(|a, b| a == b) {
        count_cluster(meta, same, to)?;
    }
    Ok(())
}

/// Counts a cluster that is referred to as often as it is in `same`: compressed clusters share one.
fn count_cluster(meta: &mut Meta, same: &[HostCluster], to: &mut Share) -> Result<()> {
    let Some(cluster) = same.first() else { return Ok(()) };
    meta.refcounts.trim()?;
    let references = meta.refcounts.get(*cluster)?;
    let bytes = meta.geometry().cluster_size();
    if references <= to_u64(same.len()) {
        to.alone += bytes;
    } else {
        to.shared += bytes;
    }
    Ok(())
}
