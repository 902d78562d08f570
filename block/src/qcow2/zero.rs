//! Discard and write-zeroes.

use std::sync::atomic::Ordering;

use crate::num::to_usize;
use crate::{Result, WriteBuf};

use super::Qcow2;
use super::layout::Mapping;
use super::meta::Meta;
use super::subcluster::{Cluster, mask};

/// What shall become of whole clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Not needed any more.
    Discard,
    /// Must read as zeroes; the space may go.
    Unmap,
    /// Must read as zeroes; the space stays.
    Keep,
}

/// What becomes of the last subcluster of a range that ends within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edge {
    /// It belongs to the range if the disk ends with the range. That is looked at with the subcluster
    /// held: a disk that grew meanwhile may have data behind the range.
    AtDiskEnd,
    /// It belongs to the range.
    Within,
}

impl Qcow2 {
    /// Whole subclusters are given back; parts of them are left as they are.
    pub(super) fn discard_disk(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let size = self.geometry.subcluster_size();
        let start = offset.next_multiple_of(size);
        self.change_clusters(start, offset + len, Wish::Discard, Edge::AtDiskEnd).map(|_| ())
    }

    pub(super) fn zero_disk(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_range(offset, len)?;
        let end = offset + len;
        let wish = if unmap { Wish::Unmap } else { Wish::Keep };
        self.zero_range(offset, end, wish, Edge::AtDiskEnd)
    }

    /// Makes what lies past the end of the disk read as zeroes, for when the disk reaches there. With nothing open
    /// below, a subcluster in which the disk ends, and of which the image has nothing, stays so: zeroes would
    /// hide what the image names as its backing file from the disk as it is.
    pub(super) fn zero_past_end(&self, start: u64, end: u64) -> Result<()> {
        let whole = start.next_multiple_of(self.geometry.subcluster_size()).min(end);
        let start = if self.has_nothing(start, whole - start)? { whole } else { start };
        self.zero_range(start, end, Wish::Unmap, Edge::Within)
    }

    /// Whether nothing but zeroes is there, with nothing open below, for a part of a cluster.
    fn has_nothing(&self, guest: u64, len: u64) -> Result<bool> {
        if len == 0 || self.backing().is_some() {
            return Ok(false);
        }
        let _held = self.in_flight.exclusive(self.clusters_of(guest, len));
        self.maps_to_zero(&mut self.meta(), guest, len, true)
    }

    fn zero_range(&self, offset: u64, end: u64, wish: Wish, edge: Edge) -> Result<()> {
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
            let stop = self.change_clusters(at, end, wish, edge)?;
            at = stop.min(end);
            if at < end {
                // A part of a subcluster, or the format cannot say zero: zeroes are written.
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
            let bare = self.backing().is_none() && !self.says_zeroes(&meta);
            if self.maps_to_zero(&mut meta, guest, len, bare)? {
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
        self.change_clusters(start, end, Wish::Discard, Edge::Within).map(|_| ())
    }

    /// Changes the entries of whole subclusters from `start` on, where one begins; gives the guest
    /// offset up to which it did, `end` or more if it did all.
    fn change_clusters(&self, start: u64, end: u64, wish: Wish, edge: Edge) -> Result<u64> {
        let geometry = self.geometry;
        let coverage = geometry.l2_coverage();
        let mut at = start;
        while at < end {
            let from = at;
            let stop = (at + 1).next_multiple_of(coverage).min(end);
            let _held = self.in_flight.exclusive(self.clusters_of(at, stop - at));
            let stop = if stop == end { self.whole_to(end, edge) } else { stop };
            if stop <= at {
                return Ok(at);
            }
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
        Ok(at)
    }

    /// Where the whole subclusters of a range end. The last of them must be held.
    fn whole_to(&self, end: u64, edge: Edge) -> u64 {
        if edge == Edge::Within || end == self.disk_size() {
            end.next_multiple_of(self.geometry.subcluster_size())
        } else {
            end - self.geometry.in_subcluster(end)
        }
    }

    /// Zeroes a range of the external data file; its space goes unless it shall stay.
    fn zero_data(&self, start: u64, end: u64, wish: Wish) -> Result<()> {
        let end = end.min(self.disk_size());
        if start >= end {
            return Ok(());
        }
        self.data.write_zeroes(start, end - start, wish != Wish::Keep)
    }

    /// Has zeroes that are written from now on be the image's own also where nothing is below it:
    /// another image may come there later, which must not be seen through them.
    pub(crate) fn record_zeroes(&self) {
        self.records_zeroes.store(true, Ordering::Release);
    }

    /// Whether zeroes are recorded where the image has nothing and nothing is below it. So they are,
    /// too, where the image names a backing file that is not open: whoever opens the image by its own
    /// names reads them then. Version 2 cannot say zero and would take space for all of them.
    pub(super) fn says_zeroes(&self, meta: &Meta) -> bool {
        let named = self.geometry.version >= 3 && meta.header.backing_file.is_some();
        named || self.records_zeroes.load(Ordering::Acquire)
    }

    /// Where a cluster stays as it is, whether that is what was wished for. In version 2 zeroes that
    /// have to be recorded (`said`) are to be written.
    fn as_it_is(&self, old: &Cluster, set: u32, wish: Wish, said: bool) -> Option<bool> {
        let geometry = self.geometry;
        let v3 = geometry.version >= 3;
        let bare = self.backing().is_none() && !(said && (v3 || wish != Wish::Discard));
        let every = set == mask(0..geometry.subclusters());
        let has_host = old.mapping.run(geometry).is_some();
        let stays = wish == Wish::Keep || self.no_unref.is_some();
        if old.reads_zero(set, bare) && (!has_host || stays || !every) {
            return Some(true);
        }
        if wish == Wish::Discard && old.mapping == Mapping::Unallocated {
            return Some(true);
        }
        // A part of a compressed cluster cannot be zero on its own.
        let part = !every && matches!(old.mapping, Mapping::Compressed { .. });
        // Version 2 over a backing file: a discarded cluster reads as before.
        let shows_backing = !v3 && !bare;
        (part || shows_backing).then_some(wish == Wish::Discard)
    }

    /// Changes the subclusters of a range within one cluster. Says whether it could do it. `holes`
    /// gets what keeps its place but not its space (host offset and bytes): the entry says zero
    /// already, and what it said before may be zero or as it was.
    pub(super) fn change_cluster(
        &self,
        meta: &mut Meta,
        guest: u64,
        len: u64,
        wish: Wish,
        holes: &mut Vec<(u64, u64)>,
    ) -> Result<bool> {
        let geometry = self.geometry;
        let old = meta.cluster(guest)?;
        let set = mask(geometry.touched(guest, len));
        let said = self.says_zeroes(meta);
        if let Some(done) = self.as_it_is(&old, set, wish, said) {
            return Ok(done);
        }
        let v3 = geometry.version >= 3;
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
            if let Some(run) = old.mapping.run(geometry) {
                meta.defer_discard(run);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::{Probe, Qcow2};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;
    use crate::{Format, Preallocation, Progress, ReadBuf, WriteBuf};

    const CLUSTER: u64 = 1024;
    /// The disk ends within a cluster, which the second L2 table has.
    const SIZE: u64 = 200 * CLUSTER + 512;

    /// Has `change` wait for the first cluster of the range from 0 on, while the disk grows and gets
    /// data behind its old end; what was written must be there afterwards.
    #[track_caller]
    fn grow_meanwhile(change: impl FnOnce(&Qcow2) + Send) {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options =
            CreateOptions { size: SIZE, cluster_size: Some(CLUSTER), ..CreateOptions::default() };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let image = Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap();
        image.write(0, &[WriteBuf::new(&[1; 1024])]).unwrap();
        image.write(SIZE - 512, &[WriteBuf::new(&[2; 512])]).unwrap();
        let held = image.in_flight.shared(0..CLUSTER);
        thread::scope(|scope| {
            let change = scope.spawn(|| change(&image));
            // Until it waits for us: nobody gets past it then.
            while !change.is_finished() && image.in_flight.try_shared(0..CLUSTER).is_some() {
                thread::yield_now();
            }
            assert!(!change.is_finished());
            image.resize(SIZE + 512, Preallocation::Off, &Progress::default()).unwrap();
            image.write(SIZE, &[WriteBuf::new(&[3; 512])]).unwrap();
            drop(held);
        });
        let mut bytes = [0; 512];
        image.read(SIZE, &[ReadBuf::new(&mut bytes)]).unwrap();
        assert_eq!(bytes, [3; 512]);
        image.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
        assert_ne!(bytes, [3; 512]);
    }

    #[test]
    fn zeroes_up_to_an_end_that_moved_leave_what_was_written_behind_it() {
        grow_meanwhile(|image| {
            image.zero_disk(512, SIZE - 512, true).unwrap();
            let mut bytes = [9; 512];
            image.read(SIZE - 512, &[ReadBuf::new(&mut bytes)]).unwrap();
            assert_eq!(bytes, [0; 512]);
        });
    }

    #[test]
    fn a_whole_last_cluster_of_the_disk_goes_though_the_end_cuts_it_short() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options =
            CreateOptions { size: SIZE, cluster_size: Some(CLUSTER), ..CreateOptions::default() };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let image = Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap();
        let table = |image: &Qcow2| image.meta().cluster(SIZE - 512).unwrap().allocated;
        for discard in [true, false] {
            image.write(SIZE - 512, &[WriteBuf::new(&[2; 512])]).unwrap();
            assert_ne!(table(&image), 0);
            if discard {
                image.discard_disk(SIZE - 512, 512).unwrap();
            } else {
                image.zero_disk(SIZE - 512, 512, true).unwrap();
            }
            assert_eq!(table(&image), 0, "discard: {discard}");
        }
    }

    #[test]
    fn a_discard_up_to_an_end_that_moved_leaves_what_was_written_behind_it() {
        grow_meanwhile(|image| image.discard_disk(0, SIZE).unwrap());
    }
}
