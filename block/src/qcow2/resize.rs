//! Resizing the disk.
//!
//! **Growing**, in order:
//!
//! 1. an L1 table that is too small is copied to a larger place; the copy and its counts are durable
//!    before the header refers to it (still with the old size), the old table is freed after;
//! 2. what past the old end would show through is made to read as zeroes: stale bytes of the last
//!    cluster, leftovers of a larger disk, the backing file where it is longer, or where it is named
//!    and not open;
//! 3. clusters are taken, if asked for;
//! 4. all of that is durable, then the header gets the new size, flush.
//!
//! Up to step 4 the disk is as it was; what is past its end is seen by nobody.
//!
//! **Shrinking**: everything is durable, the header gets the new size, flush; then what lies past the
//! new end is given back. A crash in between leaves clusters mapped past the end, which the next
//! growth drops. The L1 table keeps its length.
//!
//! Requests go on meanwhile. One that was let in past the new end of a disk that shrinks is done
//! before its clusters are given back or finds them gone, because their range is held for that; what
//! it maps then is past the end. Snapshots keep the disk size they have; version 2 cannot record
//! one, so an image with snapshots refuses. Dirty bitmaps follow.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::num::{to_u64, to_usize};
use crate::preallocation::Preallocation;
use crate::{Error, Progress, Result};

use super::Qcow2;
use super::header::{MAX_L1_BYTES, field};
use super::layout::HostOffset;
use super::meta::Meta;
use super::snapshot::{runs_of, write_disk_place, write_l1};
use super::subcluster::{Cluster, mask};

/// Guest bytes whose clusters are taken at once.
const STEP: u64 = 64 << 20;

impl Qcow2 {
    /// Resizes the disk; the module has the order.
    pub(super) fn resize_disk(
        &self,
        size: u64,
        mode: Preallocation,
        progress: &Progress,
    ) -> Result<()> {
        self.begin_resize()?;
        // Only now: another resize may have ended just before.
        let old = self.disk_size();
        let result = self.check_resize(old, size, mode).and_then(|()| {
            if size >= old {
                self.grow(old, size, mode, progress)
            } else {
                self.shrink(old, size, progress)
            }
        });
        self.meta().changing = false;
        result
    }

    /// Refusals have QEMU's texts.
    fn check_resize(&self, old: u64, size: u64, mode: Preallocation) -> Result<()> {
        let refuse = |text: &str| Err(Error::Invalid(text.to_owned()));
        if !size.is_multiple_of(512) {
            return refuse("The new size must be a multiple of 512");
        }
        let meta = self.meta();
        meta.check_writable()?;
        let geometry = meta.geometry();
        if geometry.version < 3 && !meta.snapshots.is_empty() {
            return Err(Error::NotSupported(
                "Can't resize a v2 image which has snapshots".to_owned(),
            ));
        }
        if size < old && mode != Preallocation::Off {
            return refuse("Preallocation can't be used for shrinking an image");
        }
        if size > i64::MAX as u64 || geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
            return refuse("The image size is too large (try using a larger cluster size)");
        }
        Ok(())
    }

    /// One change of tables at a time; bitmaps are told of the new size before.
    fn begin_resize(&self) -> Result<()> {
        let mut meta = self.meta();
        if meta.changing {
            return Err(Error::Invalid(format!(
                "Image '{}': a change of its snapshots or its size is under way",
                meta.storage.name()
            )));
        }
        meta.changing = true;
        Ok(())
    }

    fn grow(&self, old: u64, size: u64, mode: Preallocation, progress: &Progress) -> Result<()> {
        self.grow_l1(size)?;
        let geometry = self.geometry;
        if geometry.external {
            // What the data file has past the disk is nobody's.
            if self.data.len()? > old {
                self.data.set_len(old)?;
            }
            self.data.set_len(size)?;
        }
        let mode = match mode {
            // The tables of a raw data file map all of it.
            Preallocation::Off if self.raw_data => Preallocation::Metadata,
            mode => mode,
        };
        self.clear_past_end(old, size, progress)?;
        if mode != Preallocation::Off {
            let from = old.next_multiple_of(geometry.cluster_size());
            self.preallocate(from, size, mode, progress)?;
        }
        self.put_size(size)
    }

    /// Makes the header tell the new size, after all else is durable.
    fn put_size(&self, size: u64) -> Result<()> {
        let mut meta = self.meta();
        self.bitmaps_before_resize(&mut meta, size)?;
        meta.sync()?;
        if let Err(e) =
            meta.write_field(field::SIZE, &size.to_be_bytes()).and_then(|()| meta.storage.flush())
        {
            // The disk may have either size; the next sync makes it the old one.
            meta.unsettled = true;
            return Err(e);
        }
        meta.header.size = size;
        self.size.store(size, Ordering::Release);
        drop(meta);
        self.bitmaps_after_resize(size);
        Ok(())
    }

    /// Step 1 of growing.
    fn grow_l1(&self, size: u64) -> Result<()> {
        let mut meta = self.meta();
        let entries = meta.geometry().l1_entries(size);
        if entries <= u64::from(meta.header.l1_size) {
            return Ok(());
        }
        // The table on disk must be the one in memory, which is left.
        meta.sync()?;
        let (old_run, disk) = (meta.l1_run(), meta.header.size);
        let (old_at, old_size) = (meta.header.l1_offset, meta.header.l1_size);
        let mut l1 = meta.l1.clone();
        l1.resize(to_usize(entries), 0);
        let run = write_l1(&mut meta, &l1)?;
        let at = meta.geometry().offset_of(run.first).0;
        let length = u32::try_from(entries).unwrap_or(u32::MAX);
        let moved = meta.sync().and_then(|()| {
            write_disk_place(&meta, disk, at, length)?;
            meta.storage.flush()
        });
        if let Err(e) = moved {
            // The header may have either table; the old one is in force, and is settled if it can be.
            let back =
                write_disk_place(&meta, disk, old_at, old_size).and_then(|()| meta.storage.flush());
            match back {
                Ok(()) => meta.free_after_error(&[run]),
                Err(_) => meta.unsettled = true,
            }
            return Err(e);
        }
        meta.replace_l1(l1, at, length);
        if old_size > 0 {
            meta.free(old_run)?;
        }
        meta.sync()
    }

    /// Step 2 of growing.
    fn clear_past_end(&self, old: u64, size: u64, progress: &Progress) -> Result<()> {
        let geometry = self.geometry;
        let shown = match self.backing() {
            Some(backing) => backing.size(),
            // Whoever opens the image by its own names may find a longer one there.
            None if geometry.version >= 3 && self.says_zeroes(&self.meta()) => u64::MAX,
            None => 0,
        };
        let end = size.next_multiple_of(geometry.cluster_size());
        let mut at = old;
        while at < end {
            progress.check()?;
            let stop = (at + 1).next_multiple_of(geometry.l2_coverage()).min(end);
            let mapped = {
                let meta = self.meta();
                meta.l1.get(to_usize(geometry.l1_index(at))).is_some_and(|entry| *entry != 0)
            };
            if mapped || at < shown {
                self.zero_past_end(at, stop)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Step 3 of growing: takes a cluster for each of the guest's in a range that reads as zeroes.
    fn preallocate(
        &self,
        start: u64,
        end: u64,
        mode: Preallocation,
        progress: &Progress,
    ) -> Result<()> {
        let geometry = self.geometry;
        progress.add_total(end.saturating_sub(start));
        let mut at = start;
        while at < end {
            progress.check()?;
            let stop = end
                .next_multiple_of(geometry.cluster_size())
                .min((at + 1).next_multiple_of(geometry.l2_coverage()))
                .min(at + STEP);
            let _held = self.in_flight.exclusive(at..stop);
            let wanted = geometry.clusters(stop - at);
            let (run, host) = if geometry.external {
                (None, HostOffset(at))
            } else {
                let mut meta = self.meta();
                meta.check_writable()?;
                meta.trim()?;
                let run = meta.allocate(wanted, false)?;
                (Some(run), geometry.offset_of(run.first))
            };
            let count = run.map_or(wanted, |run| run.count);
            let bytes =
                geometry.bytes_of(count).min(if run.is_some() { u64::MAX } else { end - at });
            let done =
                self.zero_host(host, bytes, mode).and_then(|()| self.map_run(at, host, count));
            if let Err(e) = done {
                if let Some(run) = run {
                    self.give_back_unmapped(at, host, run.count);
                }
                return Err(e);
            }
            progress.advance(geometry.bytes_of(count).min(end - at));
            at += geometry.bytes_of(count);
        }
        Ok(())
    }

    /// Free clusters may hold what somebody left there.
    fn zero_host(&self, host: HostOffset, bytes: u64, mode: Preallocation) -> Result<()> {
        match mode {
            Preallocation::Full => {
                let zeroes = vec![0; to_usize(bytes.min(1 << 20))];
                let mut done = 0;
                while done < bytes {
                    let n = (bytes - done).min(to_u64(zeroes.len()));
                    let part = crate::WriteBuf::new(&zeroes[..to_usize(n)]);
                    self.data.write_at(host.0 + done, &[part])?;
                    done += n;
                }
                Ok(())
            }
            Preallocation::Falloc => self.data.write_zeroes(host.0, bytes, false),
            _ => {
                let end = host.0 + bytes;
                let len = self.data.len()?;
                if host.0 < len {
                    self.data.write_zeroes(host.0, end.min(len) - host.0, true)?;
                }
                // By a write to a place that is ours: a length would cut off what others write past
                // it meanwhile.
                let last = [crate::WriteBuf::new(&[0])];
                if len < end { self.data.write_at(end - 1, &last) } else { Ok(()) }
            }
        }
    }

    /// Points guest clusters to host clusters in a row.
    fn map_run(&self, guest: u64, host: HostOffset, count: u64) -> Result<()> {
        let geometry = self.geometry;
        let every = mask(0..geometry.subclusters());
        let mut meta = self.meta();
        for n in 0..count {
            let at = guest + geometry.bytes_of(n);
            let words = Cluster::encode(Some(host + geometry.bytes_of(n)), every, 0, geometry);
            let old = meta.cluster(at)?.mapping.run(geometry);
            let table = meta.l2_for_write(geometry.l1_index(at))?;
            table.set_both(geometry.l2_index(at), words);
            if let Some(run) = old {
                meta.defer_free(run);
            }
        }
        Ok(())
    }

    /// Frees those of new clusters that no entry refers to, after an error.
    fn give_back_unmapped(&self, guest: u64, host: HostOffset, count: u64) {
        let geometry = self.geometry;
        let mut meta = self.meta();
        for n in 0..count {
            let run = meta.cluster_run(host + geometry.bytes_of(n));
            let at = guest + geometry.bytes_of(n);
            let used = meta.cluster(at).is_ok_and(|c| c.mapping.run(geometry) == Some(run));
            if !used {
                meta.free_after_error(&[run]);
            }
        }
    }

    fn shrink(&self, old: u64, size: u64, progress: &Progress) -> Result<()> {
        {
            // Nobody is at work while the end moves.
            let _held = self.in_flight.exclusive(0..u64::MAX);
            self.put_size(size)?;
        }
        if self.geometry.external {
            self.data.set_len(size)?;
        }
        self.drop_past_end(size)?;
        let geometry = self.geometry;
        self.drop_tables(geometry.l1_entries(size)..geometry.l1_entries(old), progress)?;
        self.meta().sync()?;
        self.give_space_back();
        Ok(())
    }

    /// Takes L2 tables out, each with its range held: a request that was let in before the disk shrank
    /// may still use what it maps.
    fn drop_tables(&self, indices: Range<u64>, progress: &Progress) -> Result<()> {
        let coverage = self.geometry.l2_coverage();
        for index in indices {
            progress.check()?;
            let _held = self.in_flight.exclusive(index * coverage..(index + 1) * coverage);
            drop_table(&mut self.meta(), index)?;
        }
        Ok(())
    }
}

/// Takes an L2 table out of the active L1 table, with all that it refers to.
fn drop_table(meta: &mut Meta, l1_index: u64) -> Result<()> {
    let index = to_usize(l1_index);
    let Some(entry) = meta.l1.get(index).copied().filter(|entry| *entry != 0) else {
        return Ok(());
    };
    let runs = runs_of(meta, entry)?;
    meta.set_l1(index, 0);
    for run in runs {
        meta.defer_free(run);
    }
    if let Some(table) = super::layout::table_of(entry) {
        meta.defer_free(meta.cluster_run(table));
    }
    meta.trim()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::{Probe, Qcow2};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;
    use crate::{Format, Progress, WriteBuf};

    #[test]
    fn clusters_past_the_new_end_stay_while_a_request_uses_them() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options =
            CreateOptions { size: 4 << 20, cluster_size: Some(512), ..CreateOptions::default() };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let image = Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap();
        let at = 1 << 20;
        image.write(at, &[WriteBuf::new(&[1; 512])]).unwrap();
        let table = usize::try_from(image.geometry.l1_index(at)).unwrap();
        let range = image.clusters_of(at, 512);
        let held = image.in_flight.shared(range.clone());
        thread::scope(|scope| {
            let tables = 1..image.geometry.l1_entries(4 << 20);
            let shrink = scope.spawn(|| image.drop_tables(tables, &Progress::default()).unwrap());
            // Until it waits for us: nobody gets past it then.
            while !shrink.is_finished() && image.in_flight.try_shared(range.clone()).is_some() {
                thread::yield_now();
            }
            assert_ne!(image.meta().l1[table], 0);
            drop(held);
        });
        assert_eq!(image.meta().l1[table], 0);
    }
}
