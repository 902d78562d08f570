//! Copying data up from the backing file, so that the image no longer depends on it.

use crate::num::to_usize;
use crate::{ReadBuf, Result, WriteBuf, iobuf};

use super::Qcow2;
use super::read::{Extent, Source};
use super::zero::Wish;

/// Bytes that are read and written at once.
const CHUNK: u64 = 1 << 20;

impl Qcow2 {
    /// Gives the range its own copy of what it reads from the backing file; the rest of it stays as it
    /// is, and so does what is read.
    ///
    /// **Order.** A range is held alone from the look at its mapping on until its entries are changed: a
    /// write of the guest comes before, and is kept, or after, and goes on top. Entries reach the disk
    /// after the data, as with any write.
    pub(super) fn take_over(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = self.piece(at, len - done);
            let held = self.in_flight.exclusive(self.clusters_of(at, n));
            // Whole subclusters: a write to a part of one would copy the rest.
            let unit = self.geometry.subcluster_size();
            let start = at - at % unit;
            let end = (at + n).next_multiple_of(unit).min(self.disk_size());
            for extent in self.map_active(start, end - start)? {
                if extent.source == Source::Backing {
                    self.take_extent(extent)?;
                }
            }
            drop(held);
            done += n;
        }
        Ok(())
    }

    /// The clusters of the extent are held.
    fn take_extent(&self, extent: Extent) -> Result<()> {
        let end = extent.guest + extent.len;
        let chunk = CHUNK.max(self.geometry.cluster_size());
        let mut at = extent.guest;
        while at < end {
            // Up to a boundary of chunks, which are whole clusters.
            let stop = (at + 1).next_multiple_of(chunk).min(end);
            if self.is_zero_below(at, stop)? {
                self.take_zeroes(at, stop)?;
            } else {
                let mut bytes = vec![0; to_usize(stop - at)];
                let piece = Extent { guest: at, len: stop - at, source: Source::Backing };
                self.read_extents(&[piece], &[ReadBuf::new(&mut bytes)], false)?;
                if iobuf::is_zero(&[WriteBuf::new(&bytes)]) {
                    self.take_zeroes(at, stop)?;
                } else {
                    self.write_allocating(at, stop - at, &[WriteBuf::new(&bytes)])?;
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// Whether the images below say that they read as zeroes there.
    fn is_zero_below(&self, at: u64, end: u64) -> Result<bool> {
        let Some(backing) = self.backing() else { return Ok(true) };
        let inside = backing.size().clamp(at, end) - at;
        if inside == 0 {
            return Ok(true);
        }
        let status = backing.block_status(at, inside)?;
        let told: u64 = status.iter().map(|extent| extent.len).sum();
        Ok(told == inside && status.iter().all(|extent| extent.zero))
    }

    /// Has a range of whole subclusters read as zeroes by its own entries.
    fn take_zeroes(&self, start: u64, end: u64) -> Result<()> {
        let geometry = self.geometry;
        let mut at = start;
        {
            let mut meta = self.meta();
            meta.check_writable()?;
            meta.trim()?;
            // Stays empty: none of these clusters has a place that could be freed.
            let mut holes = Vec::new();
            while at < end {
                let next = (geometry.cluster_start(at) + geometry.cluster_size()).min(end);
                if !self.change_cluster(&mut meta, at, next - at, Wish::Keep, &mut holes)? {
                    break;
                }
                at = next;
            }
        }
        if at == end {
            return Ok(());
        }
        // Version 2 has no zero clusters.
        let zeroes = vec![0; to_usize(end - at)];
        self.write_allocating(at, end - at, &[WriteBuf::new(&zeroes)])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use crate::qcow2::create::{CreateOptions, Version, create};
    use crate::qcow2::{Probe, Qcow2};
    use crate::raw::Raw;
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;
    use crate::{Format, Progress, ReadBuf, WriteBuf};

    const SIZE: u64 = (3 << 20) + 512;
    const BELOW: usize = 2 << 20;

    fn over(bytes: Vec<u8>, options: CreateOptions) -> Qcow2 {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options = CreateOptions { size: SIZE, ..options };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let below = Raw::open(Arc::new(MemoryStorage::new(bytes)), true).unwrap();
        Qcow2::open(Probe::new(storage).unwrap(), Some(Arc::new(below)), false).unwrap()
    }

    fn all(image: &Qcow2) -> Vec<u8> {
        let mut bytes = vec![0xee; usize::try_from(SIZE).unwrap()];
        image.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
        bytes
    }

    fn kinds() -> [CreateOptions; 4] {
        let small = CreateOptions { cluster_size: Some(4096), ..CreateOptions::default() };
        [
            CreateOptions::default(),
            small.clone(),
            CreateOptions { version: Some(Version::V2), ..small },
            CreateOptions { extended_l2: Some(true), ..CreateOptions::default() },
        ]
    }

    #[test]
    fn an_image_reads_the_same_once_what_is_below_is_taken_away() {
        for options in kinds() {
            let mut bytes = vec![0; BELOW];
            bytes[700_000..800_000].fill(7);
            bytes[BELOW - 3000..].fill(8);
            let image = over(bytes, options.clone());
            image.write(710_001, &[WriteBuf::new(&[9; 5000])]).unwrap();
            image.write_zeroes(750_000, 20_000, true).unwrap();
            let before = all(&image);
            image.take_over(0, SIZE).unwrap();
            assert_eq!(all(&image), before);
            drop(image.replace_backing(None));
            assert!(all(&image) == before, "{options:?}");
            let status = image.block_status(0, SIZE).unwrap();
            assert!(status.iter().all(|extent| extent.depth == 1), "{status:?}");
        }
    }

    #[test]
    fn a_part_is_taken_over_in_whole_subclusters_and_zeroes_take_no_space() {
        let image = over(vec![0; BELOW], CreateOptions::default());
        let before = image.storage.len().unwrap();
        image.take_over(1, 1 << 20).unwrap();
        let status = image.block_status(0, SIZE).unwrap();
        assert_eq!((status[0].len, status[0].zero, status[0].depth), (17 << 16, true, 1));
        // A table of entries, but no data.
        assert!(image.storage.len().unwrap() <= before + (1 << 16));
    }

    #[test]
    fn writes_beside_it_are_never_undone() {
        for options in kinds() {
            let image = over(vec![1; BELOW], options);
            thread::scope(|scope| {
                let image = &image;
                for n in 0..3_u8 {
                    scope.spawn(move || {
                        for at in (0..BELOW as u64).step_by(1536) {
                            let at = at + u64::from(n) * 512;
                            if at + 512 <= BELOW as u64 {
                                image.write(at, &[WriteBuf::new(&[n + 2; 512])]).unwrap();
                            }
                        }
                    });
                }
                for at in (0..BELOW as u64).step_by(64 << 10) {
                    image.take_over(at, 64 << 10).unwrap();
                }
            });
            let expected = (0..BELOW).map(|at| u8::try_from(at / 512 % 3).unwrap() + 2);
            assert!(all(&image)[..BELOW].iter().copied().eq(expected));
        }
    }
}
