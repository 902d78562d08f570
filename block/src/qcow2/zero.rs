//! Discard and write-zeroes.

use crate::num::to_usize;
use crate::{Result, WriteBuf};

use super::Qcow2;
use super::layout::{COPIED, Mapping, ZERO};
use super::meta::Meta;

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
    /// Whole clusters are given back; parts of clusters are left as they are.
    pub(super) fn discard_disk(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let size = self.geometry.cluster_size();
        let start = offset.next_multiple_of(size);
        let mut end = self.geometry.cluster_start(offset + len);
        // The last cluster of the disk may be cut short by its end.
        if offset + len == self.disk_size() {
            end = (offset + len).next_multiple_of(size);
        }
        self.change_clusters(start, end, Wish::Discard).map(|_| ())
    }

    pub(super) fn zero_disk(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_range(offset, len)?;
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let wish = if unmap { Wish::Unmap } else { Wish::Keep };
        let at_disk_end = end == self.disk_size();
        let mut at = offset;
        while at < end {
            let cluster = self.geometry.cluster_start(at);
            let whole_from = at.next_multiple_of(size);
            if at != whole_from {
                let n = (cluster + size).min(end) - at;
                self.zero_part(at, n)?;
                at += n;
                continue;
            }
            let whole_to = if at_disk_end {
                end.next_multiple_of(size)
            } else {
                self.geometry.cluster_start(end)
            };
            if whole_to <= at {
                self.zero_part(at, end - at)?;
                break;
            }
            // Where the format cannot say zero, zeroes are written.
            let stop = self.change_clusters(at, whole_to, wish)?;
            at = stop.min(end);
            if at < whole_to.min(end) {
                let n = size.min(end - at);
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

    /// Changes the entries of whole clusters; gives the guest offset at which it had to stop, `end`
    /// if it did not.
    fn change_clusters(&self, start: u64, end: u64, wish: Wish) -> Result<u64> {
        let coverage = self.geometry.l2_coverage();
        let mut at = start;
        while at < end {
            let stop = (at + 1).next_multiple_of(coverage).min(end);
            let _held = self.in_flight.exclusive(at..stop);
            let mut meta = self.meta();
            meta.check_writable()?;
            meta.trim()?;
            while at < stop {
                if !self.change_cluster(&mut meta, at, wish)? {
                    return Ok(at);
                }
                at += self.geometry.cluster_size();
            }
        }
        Ok(end)
    }

    /// Says whether it could do it.
    fn change_cluster(&self, meta: &mut Meta, guest: u64, wish: Wish) -> Result<bool> {
        let geometry = self.geometry;
        let old = meta.mapping(guest)?;
        let v3 = geometry.version >= 3;
        let reads_zero = match old {
            Mapping::Unallocated => self.backing.is_none(),
            Mapping::Zero { .. } => true,
            _ => false,
        };
        let has_host = old.run(geometry).is_some();
        if reads_zero && (!has_host || wish == Wish::Keep) {
            return Ok(true);
        }
        if wish == Wish::Discard && old == Mapping::Unallocated {
            return Ok(true);
        }
        let entry = match old {
            Mapping::Data { host, copied: true } if wish == Wish::Keep && v3 => {
                host.0 | ZERO | COPIED
            }
            // Without an entry the backing file would show through.
            _ if v3 => ZERO,
            _ if self.backing.is_none() => 0,
            // Version 2 over a backing file: a discarded cluster reads as before.
            _ => return Ok(wish == Wish::Discard),
        };
        let table = meta.l2_for_write(geometry.l1_index(guest))?;
        table.set_entry(geometry.l2_index(guest), entry);
        if let Some(run) = old.run(geometry)
            && Mapping::decode(entry, geometry).ok().and_then(|m| m.run(geometry)) != Some(run)
        {
            meta.defer_free(run);
        }
        Ok(true)
    }
}
