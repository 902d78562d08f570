//! Writing: in place where the cluster is ours alone, else into a new cluster (copy on write).

use std::ops::Range;

use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::{ReadBuf, Result, WriteBuf};

use super::Qcow2;
use super::layout::{Geometry, HostOffset, Run};
use super::meta::Meta;
use super::read::{Source, map};
use super::subcluster::{Cluster, mask};

/// A run of guest clusters to be written to a run of host clusters.
#[derive(Debug)]
pub(crate) struct Target {
    /// Guest offset of the first byte written by the request.
    pub(super) guest: u64,
    /// Bytes the request writes.
    pub(super) len: u64,
    /// Host offset of `guest`.
    pub(super) host: HostOffset,
    /// Bytes before and after that must be written too, with what they read as now.
    pub(super) head: u64,
    pub(super) tail: u64,
    /// What each cluster was mapped to, if entries change. Empty if data goes where it is already.
    pub(super) old: Vec<Cluster>,
}

impl Target {
    fn is_new(&self) -> bool {
        !self.old.is_empty()
    }

    /// The guest range that is written, with `head` and `tail`.
    fn whole(&self) -> Range<u64> {
        self.guest - self.head..self.guest + self.len + self.tail
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
            let mut meta = self.meta_to_look();
            meta.check_writable()?;
            if meta.frozen {
                meta.trim_clean();
            } else {
                meta.trim()?;
            }
            let mut targets = Vec::new();
            if !plan(&mut meta, guest, len, &mut targets, false)? {
                return Ok(false);
            }
            targets
        };
        let mut done = 0;
        for target in targets {
            let part = iobuf::slice_write(bufs, done, target.len);
            self.data.write_at(target.host.0, &part)?;
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
                    self.data.write_at(target.host.0, &part)?;
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
    pub(super) fn give_back(&self, targets: &[Target]) {
        if self.geometry.external || targets.is_empty() {
            return;
        }
        let mut meta = self.meta();
        for target in targets.iter().filter(|t| t.is_new()) {
            let first = meta.geometry().cluster_of(target.host);
            for (n, old) in target.old.iter().enumerate() {
                let run = Run::one(first + to_u64(n));
                // A commit that failed half-way may have put some entries in place already.
                let guest = meta.geometry().cluster_start(target.guest)
                    + to_u64(n) * meta.geometry().cluster_size();
                let now = meta.cluster(guest).ok().and_then(|c| c.mapping.run(self.geometry));
                if old.mapping.run(self.geometry) != Some(run) && now != Some(run) {
                    meta.free_after_error(&[run]);
                }
            }
        }
    }

    /// Writes the request's bytes, and around them what was there.
    fn write_new(&self, target: &Target, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let (head, tail) = (target.head, target.tail);
        let before = self.old_contents(target.guest - head, head)?;
        let after = self.old_contents(target.guest + target.len, tail)?;
        let mut all = Vec::with_capacity(bufs.len() + 2);
        if head > 0 {
            all.push(WriteBuf::new(&before));
        }
        all.extend_from_slice(bufs);
        if tail > 0 {
            all.push(WriteBuf::new(&after));
        }
        self.data.write_at(target.host.0 - head, &all)
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
/// cluster whose entry would have to change.
pub(super) fn plan(
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
        let old = meta.cluster(at)?;
        let wanted = mask(geometry.touched(at, n));
        match old.own_place() {
            Some(host) if old.allocated & wanted == wanted => {
                check_place(meta, host)?;
                push_target(
                    targets,
                    Target {
                        guest: at,
                        len: n,
                        host: host + in_cluster,
                        head: 0,
                        tail: 0,
                        old: Vec::new(),
                    },
                );
                at += n;
            }
            _ if !allocate => return Ok(false),
            Some(host) => {
                meta.l2_for_write(geometry.l1_index(at))?;
                check_place(meta, host)?;
                let (head, tail) = around(geometry, at, n, &old, true);
                push_target(
                    targets,
                    Target {
                        guest: at,
                        len: n,
                        host: host + in_cluster,
                        head,
                        tail,
                        old: vec![old],
                    },
                );
                at += n;
            }
            None => at = plan_new(meta, at, end, targets)?,
        }
    }
    Ok(true)
}

/// Refuses to write guest data over metadata. An external data file has none.
fn check_place(meta: &mut Meta, host: HostOffset) -> Result<()> {
    if meta.geometry().external {
        return Ok(());
    }
    let run = meta.cluster_run(host);
    meta.check_overlap(run)
}

/// How many bytes before and after a write within one cluster must be written with it: up to the
/// bounds of its subclusters where these hold no data yet, and in a new place (not `stays`) all
/// that the old place holds.
fn around(geometry: Geometry, guest: u64, len: u64, old: &Cluster, stays: bool) -> (u64, u64) {
    let size = geometry.subcluster_size();
    let touched = geometry.touched(guest, len);
    let (from, to) = (geometry.in_cluster(guest), geometry.in_cluster(guest) + len);
    let mut range = u64::from(touched.start) * size..u64::from(touched.end) * size;
    if stays {
        // What is allocated already is there.
        if old.allocated >> touched.start & 1 != 0 {
            range.start = from;
        }
        if old.allocated >> (touched.end - 1) & 1 != 0 {
            range.end = to;
        }
    } else if let Some(stored) = old.stored(geometry) {
        range.start = range.start.min(u64::from(stored.start) * size);
        range.end = range.end.max(u64::from(stored.end) * size);
    }
    (from - range.start, range.end - to)
}

/// Allocates for as many clusters from `at` on as need it and come in a row on the host; gives the
/// guest offset where it ended.
fn plan_new(meta: &mut Meta, at: u64, end: u64, targets: &mut Vec<Target>) -> Result<u64> {
    let geometry = meta.geometry();
    let size = geometry.cluster_size();
    let mut olds = Vec::new();
    let mut next = at;
    while next < end {
        let old = meta.cluster(next)?;
        if old.own_place().is_some() {
            break;
        }
        // The table must be there (and ours) before data is written, so that lack of space shows.
        meta.l2_for_write(geometry.l1_index(next))?;
        olds.push(old);
        next = geometry.cluster_start(next) + size;
    }
    let (first, count) = if geometry.external {
        // There, every cluster's place is the guest's own.
        (HostOffset(geometry.cluster_start(at)), to_u64(olds.len()))
    } else {
        let run = meta.allocate(to_u64(olds.len()), false)?;
        (geometry.offset_of(run.first), run.count)
    };
    let mut guest = at;
    for (n, old) in olds.into_iter().take(to_usize(count)).enumerate() {
        let in_cluster = geometry.in_cluster(guest);
        let len = (size - in_cluster).min(end - guest);
        let host = first + (geometry.bytes_of(to_u64(n)) + in_cluster);
        let (head, tail) = around(geometry, guest, len, &old, false);
        push_target(targets, Target { guest, len, host, head, tail, old: vec![old] });
        guest += len;
    }
    Ok(guest)
}

/// Adds a cluster to the last target where it continues it, else makes a new one.
fn push_target(targets: &mut Vec<Target>, next: Target) {
    match targets.last_mut() {
        Some(last)
            if last.host + last.len == next.host
                && last.is_new() == next.is_new()
                && (last.tail, next.head) == (0, 0) =>
        {
            last.len += next.len;
            last.tail = next.tail;
            last.old.extend(next.old);
        }
        _ => targets.push(next),
    }
}

/// Points the guest's clusters to their new place.
pub(super) fn commit(meta: &mut Meta, target: &Target) -> Result<()> {
    let geometry = meta.geometry();
    let whole = target.whole();
    let mut guest = geometry.cluster_start(target.guest);
    let mut host = HostOffset(target.host.0 - geometry.in_cluster(target.guest));
    for old in &target.old {
        let next = guest + geometry.cluster_size();
        let from = whole.start.max(guest);
        let written = mask(geometry.touched(from, whole.end.min(next) - from));
        let (allocated, zero) = (old.allocated | written, old.zero & !written);
        let entry = Cluster::encode(Some(host), allocated, zero, geometry);
        let table = meta.l2_for_write(geometry.l1_index(guest))?;
        table.set_both(geometry.l2_index(guest), entry);
        if let Some(run) = old.mapping.run(geometry)
            && run.first != geometry.cluster_of(host)
        {
            meta.defer_free(run);
        }
        guest = next;
        host = host + geometry.cluster_size();
    }
    Ok(())
}

impl Qcow2 {
    /// Whether a whole range reads as zeroes without looking at data; `bare` says that what the image
    /// does not have counts as zeroes.
    pub(super) fn maps_to_zero(
        &self,
        meta: &mut Meta,
        guest: u64,
        len: u64,
        bare: bool,
    ) -> Result<bool> {
        let extents = map(
            meta,
            |meta, index| meta.l1.get(to_usize(index)).copied().unwrap_or(0),
            guest,
            len,
        )?;
        Ok(extents.iter().all(|e| match e.source {
            Source::Zero => true,
            Source::Backing => bare,
            _ => false,
        }))
    }
}
