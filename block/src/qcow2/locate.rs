//! Requests told from the tables in memory, without waiting: see [`crate::queue`].
//!
//! What is not in memory, held by another, or needs more than a look at the tables is left to the
//! methods that wait. No lock is held when this returns; the guest's range is, in `Located`.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, TryLockError};

use crate::Result;
use crate::num::to_usize;
use crate::queue::{AlignedBuf, Around, Extent, Located, MAX_COPY, Place};

use super::layout::HostOffset;
use super::meta::Meta;
use super::read::{Extent as Mapped, Source, map};
use super::write::{Target, commit, plan};
use super::{PIECE, Qcow2};

impl Qcow2 {
    /// As [`Qcow2::meta`], unless that would have to wait.
    pub(super) fn try_meta(&self) -> Option<MutexGuard<'_, Meta>> {
        self.try_meta_to_look().filter(|meta| !meta.frozen)
    }

    /// As [`Qcow2::meta_to_look`], unless another has the metadata.
    pub(super) fn try_meta_to_look(&self) -> Option<MutexGuard<'_, Meta>> {
        match self.meta.try_lock() {
            Ok(meta) => Some(meta),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether a range of a file surely starts before the file's end.
    fn is_stored(&self, host: HostOffset, len: u64) -> bool {
        let last = self.geometry.cluster_start((host.0 + len).saturating_sub(1));
        last < self.known_len.load(Ordering::Acquire)
    }

    pub(super) fn locate_disk_read(&self, guest: u64, len: u64, out: &mut Located) -> bool {
        if len > PIECE || self.check_range(guest, len).is_err() {
            return false;
        }
        let Some(held) = self.in_flight.try_shared(self.clusters_of(guest, len)) else {
            out.conflict = true;
            return false;
        };
        let extents = {
            let Some(mut meta) = self.try_meta_to_look() else {
                return false;
            };
            if !meta.tables_are_here(guest, len) {
                return false;
            }
            match map(&mut meta, Meta::active_l1, guest, len) {
                Ok(extents) => extents,
                // The method that waits will meet the error again, and report it.
                Err(_) => return false,
            }
        };
        out.held.push(held);
        self.locate_extents(extents, out)
    }

    /// Says where mapped extents are, whose clusters are held.
    fn locate_extents(&self, extents: Vec<Mapped>, out: &mut Located) -> bool {
        for extent in extents {
            match extent.source {
                Source::Zero => out.push_zero(extent.len),
                Source::Host(host) if self.is_stored(host, extent.len) => {
                    out.push_storage(&self.data, host.0, extent.len);
                }
                Source::Backing => {
                    let Some(backing) = self.backing() else {
                        out.push_zero(extent.len);
                        continue;
                    };
                    let inside = backing.size().saturating_sub(extent.guest).min(extent.len);
                    if inside > 0 && !backing.locate_read(extent.guest, inside, out) {
                        return false;
                    }
                    out.push_zero(extent.len - inside);
                }
                _ => return false,
            }
        }
        true
    }

    pub(super) fn locate_disk_write(&self, guest: u64, len: u64, out: &mut Located) -> bool {
        if len > PIECE || self.check_range(guest, len).is_err() {
            return false;
        }
        self.locate_in_place(guest, len, out).unwrap_or_else(|| self.locate_new(guest, len, out))
    }

    /// Locates a write to clusters that are ours alone; `None` if some are not.
    fn locate_in_place(&self, guest: u64, len: u64, out: &mut Located) -> Option<bool> {
        let Some(held) = self.in_flight.try_shared(self.clusters_of(guest, len)) else {
            out.conflict = true;
            return Some(false);
        };
        let mut targets = Vec::new();
        {
            let Some(mut meta) = self.try_meta_to_look() else {
                return Some(false);
            };
            if !self.can_plan(&meta, guest, len) {
                return Some(false);
            }
            match plan(&mut meta, guest, len, &mut targets, false) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(_) => return Some(false),
            }
        }
        out.held.push(held);
        for target in &targets {
            out.push_storage(&self.data, target.host.0, target.len);
        }
        Some(true)
    }

    /// Locates a write that needs new places, if what has to be copied to them is little and in the
    /// page cache.
    ///
    /// Order, as in [`Qcow2::write_allocating`]: what is around the request's bytes is read, with no
    /// lock but the range, which nobody else changes then; clusters are taken in memory; the request's
    /// bytes are written, and the copies or zeroes around them; [`Qcow2::finish_disk_write`] changes
    /// the L2 entries in memory, which reach the disk after the data. In a cluster past the end of the
    /// file the zeroes are there already: the file grows over it with a hole. That also holds after a
    /// power cut, because the entry comes to the disk after a flush of data and length; and a cluster
    /// that a cut left behind within the file is no longer past its end, so it gets its zeroes.
    fn locate_new(&self, guest: u64, len: u64, out: &mut Located) -> bool {
        let whole = self.clusters_of(guest, len);
        let Some(held) = self.in_flight.try_exclusive(whole.clone()) else {
            out.conflict = true;
            return false;
        };
        let (Some(head), Some(tail)) = (
            self.copy_of(whole.start, guest - whole.start, out),
            self.copy_of(guest + len, whole.end - (guest + len), out),
        ) else {
            return false;
        };
        let Some(mut meta) = self.try_meta() else {
            return false;
        };
        let clusters = self.geometry.clusters(whole.end - whole.start);
        let ready = self.can_plan(&meta, guest, len)
            // An L2 table may be needed beside each cluster.
            && (self.geometry.external || meta.refcounts.has_room_here(2 * clusters));
        let Ok(file_len) = self.data.len() else {
            return false;
        };
        if !ready {
            return false;
        }
        if !matches!(plan(&mut meta, guest, len, &mut out.targets, true), Ok(true)) {
            drop(meta);
            self.give_back(&out.targets);
            return false;
        }
        drop(meta);
        out.held.push(held);
        // Only the first target has bytes before it that are not the request's, the last behind it.
        let (mut head, mut tail) = (Some(head), Some(tail));
        for target in &out.targets {
            let hole =
                self.data.zero_past_end() && self.geometry.cluster_start(target.host.0) >= file_len;
            let before = around(&mut head, target.head, hole, true);
            let behind = around(&mut tail, target.tail, hole, false);
            let (storage, offset) = (self.data.clone(), target.host.0);
            let place = Place::Storage { storage, offset, before, behind };
            out.extents.push(Extent { len: target.len, place });
        }
        true
    }

    /// Whether a write may look at the tables without waiting for the disk.
    fn can_plan(&self, meta: &Meta, guest: u64, len: u64) -> bool {
        meta.check_writable().is_ok()
            && !meta.needs_trim()
            && meta.tables_are_here(guest, len)
            // Counts may have to be read for what a snapshot being made is owed.
            && !meta.owes_any(guest, len)
    }

    /// What a range of clusters that are held reads as, if that can be told at once. It may go past the
    /// end of the disk. Memory for it is taken from `out`.
    fn copy_of(&self, guest: u64, len: u64, out: &mut Located) -> Option<Old> {
        if len == 0 {
            return Some(Old::Zero);
        }
        let extents = {
            let mut meta = self.try_meta_to_look()?;
            if !meta.tables_are_here(guest, len) {
                return None;
            }
            map(&mut meta, Meta::active_l1, guest, len).ok()?
        };
        let backing = self.backing().map_or(0, |backing| backing.size());
        let zero = extents.iter().all(|extent| match extent.source {
            Source::Zero => true,
            Source::Backing => backing <= extent.guest,
            _ => false,
        });
        if zero {
            return Some(Old::Zero);
        }
        let mut located = Located::default();
        let count = to_usize(len);
        if count > MAX_COPY || !self.locate_extents(extents, &mut located) {
            return None;
        }
        let mut bytes = out.copy_buf();
        let part = bytes.get_mut(..count)?;
        located.read_cached(part).then_some(Old::Bytes(bytes, count))
    }

    /// Puts the new places of a located write into the tables, or gives them back.
    pub(super) fn finish_disk_write(
        &self,
        targets: &[Target],
        written: bool,
        wait: bool,
    ) -> Option<Result<()>> {
        let mut committed = 0;
        let mut result = Ok(());
        if written {
            let mut meta = if wait { self.meta() } else { self.try_meta()? };
            for target in targets {
                result = commit(&mut meta, target);
                if result.is_err() {
                    break;
                }
                committed += 1;
            }
        } else if !wait {
            // Giving back may have to read refcounts.
            return None;
        }
        self.give_back(&targets[committed..]);
        Some(result)
    }
}

/// What was beside the bytes of a request.
enum Old {
    Zero,
    /// The first so many bytes of the memory.
    Bytes(AlignedBuf, usize),
}

/// The first or last `len` bytes of what is there, taken for one target; zeroes, or nothing where a
/// hole has them.
fn around(old: &mut Option<Old>, len: u64, hole: bool, last: bool) -> Around {
    if len == 0 {
        return Around::none();
    }
    match old.take() {
        Some(Old::Bytes(bytes, have)) => {
            let want = to_usize(len);
            let start = if last { have.saturating_sub(want) } else { 0 };
            Around::Copy(bytes, start..(start + want).min(have))
        }
        _ if hole => Around::none(),
        _ => Around::Zeroes(len),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::{Options, Probe};
    use crate::raw::Raw;
    use crate::storage::{FileOptions, FileStorage, Storage};
    use crate::{Format, Progress, ReadBuf, WriteBuf};

    const DISK: u64 = 8 << 20;

    fn byte(at: u64) -> u8 {
        u8::try_from(at / 512 % 251).unwrap()
    }

    /// An image over a backing file whose bytes are as `byte` says, and are in the page cache.
    fn overlay(options: CreateOptions, direct: bool) -> (Vec<tempfile::NamedTempFile>, Qcow2) {
        let file = || tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (below, above) = (file(), file());
        let contents: Vec<u8> = (0..DISK).map(byte).collect();
        std::fs::write(below.path(), &contents).unwrap();
        let open = |path: &std::path::Path, direct| {
            let options = FileOptions { direct, ..FileOptions::default() };
            Arc::new(FileStorage::open(path, options).unwrap()) as Arc<dyn Storage>
        };
        let backing = Raw::open(open(below.path(), direct), true).unwrap();
        let storage = open(above.path(), false);
        let options =
            CreateOptions { size: DISK, backing_file: Some("below".to_owned()), ..options };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let probe = Probe::new(storage).unwrap();
        let image = Qcow2::open_with(probe, Some(Arc::new(backing)), Options::default()).unwrap();
        // So that all tables are in memory.
        image.write(0, &[WriteBuf::new(&[1; 512])]).unwrap();
        (vec![below, above], image)
    }

    fn read(image: &Qcow2, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(len)];
        image.read(at, &[ReadBuf::new(&mut bytes)]).unwrap();
        bytes
    }

    fn copied(around: &Around) -> &[u8] {
        match around {
            Around::Copy(bytes, range) => &bytes[range.clone()],
            Around::Zeroes(len) => panic!("{len} zeroes"),
        }
    }

    #[test]
    fn a_small_write_over_a_backing_file_has_a_copy_of_what_is_around_it() {
        for (extended, unit) in [(None, 65536), (Some(true), 2048)] {
            let options = CreateOptions { extended_l2: extended, ..CreateOptions::default() };
            let (_files, image) = overlay(options, false);
            // In two clusters; the second is changed up to somewhere in a subcluster.
            let (at, len): (u64, u64) = (3 * 65536 - 5000, 5000 + 3000);
            let mut located = Located::default();
            assert!(image.locate_write(at, len, &mut located));
            let places: Vec<_> = located.extents.iter().map(|e| &e.place).collect();
            let (Some(Place::Storage { before, .. }), Some(Place::Storage { behind, .. })) =
                (places.first(), places.last())
            else {
                panic!("{places:?}");
            };
            let (start, end) = (at / unit * unit, (at + len).next_multiple_of(unit));
            let old = |from: u64, to: u64| (from..to).map(byte).collect::<Vec<_>>();
            assert!(copied(before) == old(start, at), "{unit}");
            assert!(copied(behind) == old(at + len, end), "{unit}");
            // It fails: all is as it was.
            assert!(image.finish_write(&mut located, false, true).unwrap().is_ok());
            located.clear();
            assert!(read(&image, 2 * 65536, 2 * 65536) == old(2 * 65536, 4 * 65536));
        }
    }

    #[test]
    fn what_is_much_or_bypasses_the_page_cache_is_not_copied_at_once() {
        let large = CreateOptions { cluster_size: Some(2 << 20), ..CreateOptions::default() };
        for (options, direct) in [(large, false), (CreateOptions::default(), true)] {
            let (_files, image) = overlay(options, direct);
            let mut located = Located::default();
            assert!(!image.locate_write(4 << 20, 4096, &mut located));
            assert!(!located.conflict && located.held.is_empty() && located.targets.is_empty());
        }
    }

    #[test]
    fn a_write_after_a_snapshot_point_is_not_told_before_the_snapshot_has_its_references() {
        let (_files, image) = overlay(CreateOptions::default(), false);
        let is_located = |at, len| {
            let mut located = Located::default();
            let is = image.locate_write(at, len, &mut located);
            if is {
                image.finish_write(&mut located, false, true).unwrap().unwrap();
            }
            assert!(!located.conflict);
            is
        };
        assert!(is_located(512, 512) && is_located(1 << 20, 4096));
        let change = image
            .create_snapshot(&crate::NewSnapshot {
                tag: "s".to_owned(),
                date_sec: 0,
                date_nsec: 0,
                vm_clock_nsec: 0,
            })
            .unwrap();
        change.switch().unwrap();
        assert!(!is_located(512, 512), "in place, over what the snapshot has");
        assert!(!is_located(1 << 20, 4096));
        // Reads go on; the first one looks how long the file is.
        assert_eq!(read(&image, 0, 512), [1; 512]);
        let mut located = Located::default();
        assert!(image.locate_read(0, 512, &mut located));
        drop(located);
        // A write that waits takes them, and copies its cluster.
        let host = |image: &Qcow2| image.meta().cluster(0).unwrap().mapping;
        let before = host(&image);
        image.write(0, &[WriteBuf::new(&[2; 512])]).unwrap();
        assert_ne!(host(&image), before);
        assert!(is_located(512, 512) && is_located(1 << 20, 4096));
    }
}
