//! Writing: in place where the cluster is ours alone, else into a new cluster (copy on write).

use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::{ReadBuf, Result, WriteBuf};

use super::Qcow2;
use super::layout::{COPIED, HostOffset, Mapping, Run};
use super::meta::Meta;
use super::read::{Source, map};

/// A run of guest clusters to be written to a run of host clusters.
#[derive(Debug)]
struct Target {
    /// Guest offset of the first byte written by the request.
    guest: u64,
    /// Bytes the request writes.
    len: u64,
    /// Host offset of `guest`.
    host: HostOffset,
    /// For each cluster of a new place: what the guest cluster was mapped to. Empty if in place.
    old: Vec<Mapping>,
}

impl Target {
    fn is_new(&self) -> bool {
        !self.old.is_empty()
    }
}

impl Qcow2 {
    pub(super) fn write_disk(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        self.check_range(offset, len)?;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = self.piece(at, len - done);
            let part = iobuf::slice_write(bufs, done, n);
            if !self.write_in_place(at, n, &part)? {
                let held = self.in_flight.exclusive(self.clusters_of(at, n));
                self.write_allocating(at, n, &part)?;
                drop(held);
            }
            done += n;
        }
        Ok(())
    }

    /// Writes if every cluster is ours alone; says whether it did.
    fn write_in_place(&self, guest: u64, len: u64, bufs: &[WriteBuf<'_>]) -> Result<bool> {
        let _held = self.in_flight.shared(self.clusters_of(guest, len));
        let targets = {
            let mut meta = self.meta();
            meta.check_writable()?;
            meta.trim()?;
            let mut targets = Vec::new();
            if !plan(&mut meta, guest, len, &mut targets, false)? {
                return Ok(false);
            }
            targets
        };
        let mut done = 0;
        for target in targets {
            let part = iobuf::slice_write(bufs, done, target.len);
            self.storage.write_at(target.host.0, &part)?;
            done += target.len;
        }
        Ok(true)
    }

    /// Writes with new clusters where needed. The caller holds the clusters exclusively.
    ///
    /// Order: clusters are taken (in memory), data and what surrounds it is written, then the L2
    /// entries change in memory. They reach the disk by [`Meta::sync`], after the data.
    pub(super) fn write_allocating(
        &self,
        guest: u64,
        len: u64,
        bufs: &[WriteBuf<'_>],
    ) -> Result<()> {
        let mut targets = Vec::new();
        let planned = {
            let mut meta = self.meta();
            meta.check_writable()?;
            meta.trim()?;
            plan(&mut meta, guest, len, &mut targets, true)
        };
        let mut done = 0;
        let mut committed = 0;
        let result = planned.and_then(|_| {
            for target in &targets {
                let part = iobuf::slice_write(bufs, done, target.len);
                if target.is_new() {
                    self.write_new(target, &part)?;
                } else {
                    self.storage.write_at(target.host.0, &part)?;
                }
                done += target.len;
            }
            let mut meta = self.meta();
            for target in &targets {
                commit(&mut meta, target)?;
                committed += 1;
            }
            Ok(())
        });
        if result.is_err() {
            self.give_back(&targets[committed..]);
        }
        result
    }

    /// Frees the new clusters of targets that were not committed.
    fn give_back(&self, targets: &[Target]) {
        let mut meta = self.meta();
        for target in targets.iter().filter(|t| t.is_new()) {
            let first = meta.geometry().cluster_of(target.host);
            for (n, old) in target.old.iter().enumerate() {
                let cluster = first + to_u64(n);
                let kept = matches!(old, Mapping::Zero { host: Some(h), copied: true }
                    if meta.geometry().cluster_of(*h) == cluster);
                // A commit that failed half-way may have put some entries in place already.
                let guest = meta.geometry().cluster_start(target.guest)
                    + to_u64(n) * meta.geometry().cluster_size();
                let in_use = matches!(meta.mapping(guest), Ok(Mapping::Data { host, .. })
                    if meta.geometry().cluster_of(host) == cluster);
                if !kept && !in_use {
                    meta.free_after_error(&[Run::one(cluster)]);
                }
            }
        }
    }

    /// Writes whole new clusters: the request's bytes, and around them what the clusters held.
    fn write_new(&self, target: &Target, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let geometry = self.geometry;
        let head = geometry.in_cluster(target.guest);
        let end = target.guest + target.len;
        let tail = match geometry.in_cluster(end) {
            0 => 0,
            used => geometry.cluster_size() - used,
        };
        let before = self.old_contents(target.guest - head, head)?;
        let after = self.old_contents(end, tail)?;
        let mut all = Vec::with_capacity(bufs.len() + 2);
        if head > 0 {
            all.push(WriteBuf::new(&before));
        }
        all.extend_from_slice(bufs);
        if tail > 0 {
            all.push(WriteBuf::new(&after));
        }
        self.storage.write_at(target.host.0 - head, &all)
    }

    /// What the guest would read, past the end of the disk too.
    fn old_contents(&self, guest: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(len)];
        if len > 0 {
            let extents = self.map_active(guest, len)?;
            if extents.iter().any(|e| e.source != Source::Zero) {
                self.read_extents(&extents, &[ReadBuf::new(&mut bytes)], false)?;
            }
        }
        Ok(bytes)
    }
}

/// Finds a place for every cluster of a range. Without `allocate` it ends with `false` at the first
/// cluster that needs a new place.
fn plan(
    meta: &mut Meta,
    guest: u64,
    len: u64,
    targets: &mut Vec<Target>,
    allocate: bool,
) -> Result<bool> {
    let geometry = meta.geometry();
    let size = geometry.cluster_size();
    let end = guest + len;
    let mut at = guest;
    while at < end {
        let in_cluster = geometry.in_cluster(at);
        let n = (size - in_cluster).min(end - at);
        match meta.mapping(at)? {
            Mapping::Data { host, copied: true } => {
                let run = meta.cluster_run(host);
                meta.check_overlap(run)?;
                push_target(targets, at, n, host + in_cluster, None);
                at += n;
            }
            _ if !allocate => return Ok(false),
            old @ Mapping::Zero { host: Some(host), copied: true } => {
                meta.l2_for_write(geometry.l1_index(at))?;
                let run = meta.cluster_run(host);
                meta.check_overlap(run)?;
                push_target(targets, at, n, host + in_cluster, Some(old));
                at += n;
            }
            _ => at = plan_new(meta, at, end, targets)?,
        }
    }
    Ok(true)
}

/// Allocates for as many clusters from `at` on as need it and come in a row on the host; gives the
/// guest offset where it ended.
fn plan_new(meta: &mut Meta, at: u64, end: u64, targets: &mut Vec<Target>) -> Result<u64> {
    let geometry = meta.geometry();
    let size = geometry.cluster_size();
    let mut olds = Vec::new();
    let mut next = at;
    while next < end {
        let old = meta.mapping(next)?;
        let keeps_place = matches!(
            old,
            Mapping::Data { copied: true, .. } | Mapping::Zero { host: Some(_), copied: true }
        );
        if keeps_place {
            break;
        }
        // The table must be there (and ours) before data is written, so that lack of space shows.
        meta.l2_for_write(geometry.l1_index(next))?;
        olds.push(old);
        next = geometry.cluster_start(next) + size;
    }
    let run = meta.allocate(to_u64(olds.len()), false)?;
    let mut guest = at;
    for (n, old) in olds.into_iter().take(to_usize(run.count)).enumerate() {
        let in_cluster = geometry.in_cluster(guest);
        let len = (size - in_cluster).min(end - guest);
        let host = geometry.offset_of(run.first + to_u64(n)) + in_cluster;
        push_target(targets, guest, len, host, Some(old));
        guest += len;
    }
    Ok(guest)
}

/// Adds a cluster to the last target where it continues it, else makes a new one.
fn push_target(
    targets: &mut Vec<Target>,
    guest: u64,
    len: u64,
    host: HostOffset,
    old: Option<Mapping>,
) {
    match targets.last_mut() {
        Some(last) if last.host + last.len == host && last.is_new() == old.is_some() => {
            last.len += len;
            last.old.extend(old);
        }
        _ => targets.push(Target { guest, len, host, old: old.into_iter().collect() }),
    }
}

/// Points the guest's clusters to their new place.
fn commit(meta: &mut Meta, target: &Target) -> Result<()> {
    let geometry = meta.geometry();
    let mut guest = geometry.cluster_start(target.guest);
    let mut cluster = geometry.cluster_of(target.host);
    for old in &target.old {
        let index = geometry.l2_index(guest);
        let table = meta.l2_for_write(geometry.l1_index(guest))?;
        table.set_entry(index, geometry.offset_of(cluster).0 | COPIED);
        if let Some(run) = old.run(geometry)
            && run.first != cluster
        {
            meta.defer_free(run);
        }
        guest += geometry.cluster_size();
        cluster = cluster + 1;
    }
    Ok(())
}

impl Qcow2 {
    /// Whether a whole range reads as zeroes without looking at data.
    pub(super) fn maps_to_zero(&self, meta: &mut Meta, guest: u64, len: u64) -> Result<bool> {
        let extents = map(
            meta,
            |meta, index| meta.l1.get(to_usize(index)).copied().unwrap_or(0),
            guest,
            len,
        )?;
        Ok(extents.iter().all(|e| match e.source {
            Source::Zero => true,
            Source::Backing => self.backing.is_none(),
            _ => false,
        }))
    }
}
