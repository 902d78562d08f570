//! Discard and write-zeroes.

use crate::num::to_usize;
use crate::{Result, WriteBuf};

use super::Qcow2;
use super::layout::Mapping;
use super::meta::Meta;
use super::subcluster::{Cluster, mask};

/// What shall become of whole clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Not needed any more.
    Discard,
    /// Must read as zeroes; the space may go.
    Unmap,
    /// Must read as zeroes; the space stays.
    Keep,
}

impl Qcow2 {
    /// Whole subclusters are given back; parts of them are left as they are.
    pub(super) fn discard_disk(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let size = self.geometry.subcluster_size();
        let start = offset.next_multiple_of(size);
        let mut end = offset + len - self.geometry.in_subcluster(offset + len);
        // The last one of the disk may be cut short by its end.
        if offset + len == self.disk_size() {
            end = (offset + len).next_multiple_of(size);
        }
        self.change_clusters(start, end, Wish::Discard).map(|_| ())
    }

    pub(super) fn zero_disk(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_range(offset, len)?;
        let end = offset + len;
        let wish = if unmap { Wish::Unmap } else { Wish::Keep };
        self.zero_range(offset, end, wish, end == self.disk_size())
    }

    /// Makes what lies past the end of the disk read as zeroes, for when the disk reaches there.
    pub(super) fn zero_past_end(&self, start: u64, end: u64) -> Result<()> {
        self.zero_range(start, end, Wish::Unmap, true)
    }

    fn zero_range(&self, offset: u64, end: u64, wish: Wish, at_disk_end: bool) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let mut at = offset;
        while at < end {
            let whole_from = at.next_multiple_of(size);
            if at != whole_from {
                let n = whole_from.min(end) - at;
                self.zero_part(at, n)?;
                at += n;
                continue;
            }
            let whole_to = if at_disk_end {
                end.next_multiple_of(size)
            } else {
                end - self.geometry.in_subcluster(end)
            };
            if whole_to <= at {
                self.zero_part(at, end - at)?;
                break;
            }
            // Where the format cannot say zero, zeroes are written.
            let stop = self.change_clusters(at, whole_to, wish)?;
            at = stop.min(end);
            if at < whole_to.min(end) {
                let n = (self.geometry.cluster_size() - self.geometry.in_cluster(at)).min(end - at);
                self.zero_part(at, n)?;
                at += n;
            }
        }
        Ok(())
    }

    /// Writes zeroes into a part of a cluster, unless it reads as zeroes.
    fn zero_part(&self, guest: u64, len: u64) -> Result<()> {
        let _held = self.in_flight.exclusive(self.clusters_of(guest, len));
        {
            let mut meta = self.meta();
            meta.check_writable()?;
            if self.maps_to_zero(&mut meta, guest, len)? {
                return Ok(());
            }
        }
        let zeroes = vec![0; to_usize(len)];
        self.write_allocating(guest, len, &[WriteBuf::new(&zeroes)])
    }

    /// Drops what is mapped from `start` on to the end of its L2 table.
    pub(super) fn drop_past_end(&self, start: u64) -> Result<()> {
        let start = start.next_multiple_of(self.geometry.subcluster_size());
        let end = start.next_multiple_of(self.geometry.l2_coverage());
        self.change_clusters(start, end, Wish::Discard).map(|_| ())
    }

    /// Changes the entries of whole subclusters; gives the guest offset at which it had to stop,
    /// `end` if it did not.
    fn change_clusters(&self, start: u64, end: u64, wish: Wish) -> Result<u64> {
        let geometry = self.geometry;
        let coverage = geometry.l2_coverage();
        let mut at = start;
        while at < end {
            let from = at;
            let stop = (at + 1).next_multiple_of(coverage).min(end);
            let _held = self.in_flight.exclusive(self.clusters_of(at, stop - at));
            if self.raw_data {
                // Whoever reads the data file as a raw image sees what the guest sees: first there.
                self.meta().check_writable()?;
                self.zero_data(at, stop, wish)?;
            }
            let mut whole = true;
            let mut holes = Vec::new();
            {
                let mut meta = self.meta();
                meta.check_writable()?;
                meta.trim()?;
                while at < stop && whole {
                    let next = (geometry.cluster_start(at) + geometry.cluster_size()).min(stop);
                    whole = self.change_cluster(&mut meta, at, next - at, wish, &mut holes)?;
                    at = if whole { next } else { at };
                }
            }
            if geometry.external && !self.raw_data && wish != Wish::Keep {
                // Entries say zero already: what they said before is zero or as it was.
                self.zero_data(from, at, wish)?;
            }
            for (host, len) in holes {
                self.data.write_zeroes(host, len, true)?;
            }
            if !whole {
                return Ok(at);
            }
        }
        Ok(end)
    }

    /// Zeroes a range of the external data file; its space goes unless it shall stay.
    fn zero_data(&self, start: u64, end: u64, wish: Wish) -> Result<()> {
        let end = end.min(self.disk_size());
        if start >= end {
            return Ok(());
        }
        self.data.write_zeroes(start, end - start, wish != Wish::Keep)
    }

    /// Changes the subclusters of a range within one cluster. Says whether it could do it. `holes`
    /// gets what keeps its place but not its space (host offset and bytes): the entry says zero
    /// already, and what it said before may be zero or as it was.
    fn change_cluster(
        &self,
        meta: &mut Meta,
        guest: u64,
        len: u64,
        wish: Wish,
        holes: &mut Vec<(u64, u64)>,
    ) -> Result<bool> {
        let geometry = self.geometry;
        let old = meta.cluster(guest)?;
        let bare = self.backing.is_none();
        let set = mask(geometry.touched(guest, len));
        let every = set == mask(0..geometry.subclusters());
        let run = old.mapping.run(geometry);
        let has_host = run.is_some();
        let stays = wish == Wish::Keep || self.no_unref.is_some();
        if old.reads_zero(set, bare) && (!has_host || stays || !every) {
            return Ok(true);
        }
        if wish == Wish::Discard && old.mapping == Mapping::Unallocated {
            return Ok(true);
        }
        if !every && matches!(old.mapping, Mapping::Compressed { .. }) {
            // A part of it cannot be zero on its own.
            return Ok(wish == Wish::Discard);
        }
        let v3 = geometry.version >= 3;
        if !v3 && !bare {
            // Version 2 over a backing file: a discarded cluster reads as before.
            return Ok(wish == Wish::Discard);
        }
        let (allocated, zero) = (old.allocated & !set, old.zero | set);
        let table = meta.l2_for_write(geometry.l1_index(guest))?;
        let index = geometry.l2_index(guest);
        // A place is kept for what is still in it, and for later writes if the space shall stay.
        let mut keeps = allocated != 0 || (wish == Wish::Keep && old.own_place().is_some() && v3);
        if wish != Wish::Keep
            && let (Some(pass), Some(place), false) =
                (self.no_unref, old.own_place(), geometry.external)
        {
            keeps = true;
            if pass && old.allocated & set != 0 {
                let touched = geometry.touched(guest, len);
                let size = geometry.subcluster_size();
                let start = place + u64::from(touched.start) * size;
                holes.push((start.0, u64::from(touched.end - touched.start) * size));
            }
        }
        if keeps && !geometry.external && old.own_place().is_none() {
            // Snapshots use the cluster too: it stays where it is, and not ours.
            let entry = table.entry(index);
            let (_, bitmap) = Cluster::encode(None, allocated, zero, geometry);
            table.set_both(index, (entry, bitmap));
        } else if keeps {
            table.set_both(index, Cluster::encode(old.own_place(), allocated, zero, geometry));
        } else {
            let zero = if v3 { zero } else { 0 };
            table.set_both(index, Cluster::encode(None, 0, zero, geometry));
            if let Some(run) = run {
                meta.defer_discard(run);
            }
        }
        Ok(true)
    }
}
