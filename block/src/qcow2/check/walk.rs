//! Counts every reference there is in an image's tables.
//!
//! Snapshots share L2 tables with one another and the active disk. Each table is read once and its
//! references count as often as it is referred to, so that a thousand snapshots of a disk cost
//! little more than one, and tables that are referred to over and over by a bad image neither.

use std::collections::BTreeMap;

use crate::num::{be32_at, be64, be64_at, to_u64, to_usize};
use crate::{Progress, ReadBuf, Result};

use super::super::header::MAX_L1_BYTES;
use super::counts::Counts;
use super::entry::{self, Refers};
use super::image::{Bitmaps, Image, MAX_OFFSET};
use super::refcounts::DiskRefcounts;
use super::report::Report;
use super::snapshots::{SnapshotL1, SnapshotTable};

/// Most bytes of L1 tables of all snapshots together. They may lie over each other in a bad image, each
/// of another length, so the file's size alone is no bound for what there is to be read.
const MAX_SNAPSHOT_L1: u64 = 8 << 30;

/// Most bytes of the tables of all bitmaps together, for the same reason. QEMU's limit for one is 8 MiB.
const MAX_BITMAP_TABLES: u64 = 1 << 30;

/// Most L2 tables that are no clusters. Those that are can be no more than the file has clusters; these lie
/// over each other, and each is read.
const MAX_MISALIGNED: usize = 4096;

/// How often an L2 table is referred to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Uses {
    pub(super) active: u64,
    pub(super) all: u64,
}

/// A table other than an L2 table or refcount block: nothing else may refer to its clusters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fixed {
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) what: &'static str,
    /// Whether it is written in place, whatever its refcount, so that sharing it loses data.
    pub(super) in_place: bool,
}

/// A walk over all tables of an image, which counts references.
pub(super) struct Walk<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) report: &'a mut Report,
    pub(super) counts: Counts,
    pub(super) l2: BTreeMap<u64, Uses>,
    pub(super) fixed: Vec<Fixed>,
    /// Those of `l2` that are no clusters.
    misaligned: usize,
    progress: &'a Progress,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        image: &'a Image<'a>,
        report: &'a mut Report,
        progress: &'a Progress,
    ) -> Self {
        Self {
            image,
            report,
            counts: Counts::new(image.clusters(), image.max_refcount()),
            l2: BTreeMap::new(),
            fixed: Vec::new(),
            misaligned: 0,
            progress,
        }
    }

    /// Counts everything, the refcount structures of `disk` too if given; says whether it could be
    /// counted at all.
    pub(super) fn run(
        &mut self,
        snapshots: &SnapshotTable,
        disk: Option<&DiskRefcounts>,
    ) -> Result<bool> {
        let image = self.image;
        self.fixed("the header", 0, image.cluster_size(), true);
        let active = self.l1("the L1 table", image.l1_offset, image.l1_size.into(), 1, true)?;
        if active.is_none() {
            return Ok(false);
        }
        if image.data_file() && !snapshots.l1.is_empty() {
            let count = snapshots.l1.len();
            self.report.corruption(1, || format!("{count} snapshots in image with data file"));
        }
        let tables = snapshots.distinct();
        let stored = |l1: &SnapshotL1| {
            (u64::from(l1.entries) * 8).min(image.file_len.saturating_sub(l1.offset))
        };
        let bytes = tables.iter().map(|(l1, _)| stored(l1)).fold(0, u64::saturating_add);
        if bytes > MAX_SNAPSHOT_L1 {
            self.report.unchecked(|| {
                format!("the snapshots' L1 tables have {bytes} bytes, more than {MAX_SNAPSHOT_L1}")
            });
            return Ok(false);
        }
        for (l1, times) in tables {
            let (at, entries) = (l1.offset, u64::from(l1.entries));
            if !image.aligned(at) {
                self.report.corruption(times, || {
                    format!("snapshot L1 table at {at:#x}: is not cluster aligned; snapshot table entry corrupted")
                });
            } else if entries * 8 > MAX_L1_BYTES {
                self.report.corruption(times, || {
                    format!(
                        "snapshot L1 table at {at:#x}: is too large; snapshot table entry corrupted"
                    )
                });
            } else if self.l1("a snapshot's L1 table", at, entries, times, false)?.is_none() {
                return Ok(false);
            }
        }
        self.tables()?;
        self.fixed("the snapshot table", image.snapshots_offset, snapshots.bytes, false);
        if disk.is_some() {
            self.fixed("the refcount table", image.reftable_offset, image.reftable_bytes(), true);
        }
        if let Some(bitmaps) = image.bitmaps
            && !self.bitmaps(bitmaps)?
        {
            return Ok(false);
        }
        if let Some(disk) = disk {
            self.refcount_blocks(disk);
        }
        Ok(true)
    }

    /// References to the clusters of a range of bytes.
    fn add(&mut self, offset: u64, len: u64, times: u64) {
        let image = self.image;
        let Some(last) = len.checked_sub(1).map(|n| offset.saturating_add(n)) else {
            return;
        };
        if image.is_outside(offset, len) {
            self.report.corruption(times, || {
                format!("counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {len:#x}")
            });
            return;
        }
        for cluster in offset >> image.cluster_bits..=last >> image.cluster_bits {
            self.counts.grow(cluster + 1);
            let excess = self.counts.add(cluster, times);
            if excess > 0 {
                self.report.corruption(excess, || {
                    let at = cluster << image.cluster_bits;
                    format!("more references to the cluster at {at:#x} than its refcount can tell")
                });
            }
        }
    }

    /// A table as [`Fixed`] describes it.
    fn fixed(&mut self, what: &'static str, offset: u64, len: u64, in_place: bool) {
        self.add(offset, len, 1);
        if len > 0 {
            let first = offset >> self.image.cluster_bits;
            let last = offset.saturating_add(len - 1) >> self.image.cluster_bits;
            self.fixed.push(Fixed { first, count: last - first + 1, what, in_place });
        }
    }

    /// An L1 table that `times` snapshots have; `None` if it cannot be read.
    fn l1(
        &mut self,
        what: &'static str,
        offset: u64,
        entries: u64,
        times: u64,
        active: bool,
    ) -> Result<Option<()>> {
        if entries == 0 {
            return Ok(Some(()));
        }
        self.progress.check()?;
        self.add(offset, entries * 8, times);
        let first = offset >> self.image.cluster_bits;
        let count = (entries * 8).div_ceil(self.image.cluster_size());
        if times == 1 {
            self.fixed.push(Fixed { first, count, what, in_place: active });
        }
        if offset > MAX_OFFSET - entries * 8 {
            self.report.unchecked(|| format!("{what} at {offset:#x} is at no place of a file"));
            return Ok(None);
        }
        let table = match self.image.read_table(offset, entries) {
            Ok(table) => table,
            Err(e) => {
                self.report.unchecked(|| format!("{what} at {offset:#x} cannot be read: {e}"));
                return Ok(None);
            }
        };
        for l1_entry in table.into_iter().filter(|entry| *entry != 0) {
            if l1_entry & entry::L1_RESERVED != 0 {
                self.report.corruption(times, || {
                    format!("found L1 entry with reserved bits set: {l1_entry:x}")
                });
            }
            let at = l1_entry & entry::OFFSET;
            self.add(at, self.image.cluster_size(), times);
            if !self.image.aligned(at) {
                self.report.corruption(times, || {
                    format!("l2_offset={at:#x}: Table is not cluster aligned; L1 entry corrupted")
                });
            }
            // What is past the end reads as zeroes.
            if at < self.image.file_len {
                self.refer(at, times, active);
            }
        }
        Ok(Some(()))
    }

    /// Notes an L2 table, which [`Walk::tables`] reads.
    fn refer(&mut self, at: u64, times: u64, active: bool) {
        if !self.image.aligned(at) && !self.l2.contains_key(&at) {
            if self.misaligned == MAX_MISALIGNED {
                return self.report.unchecked(|| {
                    format!("the L2 table at {at:#x} is one of more than {MAX_MISALIGNED} that are no clusters")
                });
            }
            self.misaligned += 1;
        }
        let uses = self.l2.entry(at).or_default();
        uses.all = uses.all.saturating_add(times);
        uses.active += u64::from(active);
    }

    /// All L2 tables, in the order of the file.
    fn tables(&mut self) -> Result<()> {
        let image = self.image;
        // Those of the active disk are read again for their flags.
        let again = self.l2.values().filter(|uses| uses.active > 0).count();
        self.progress.add_total(to_u64(self.l2.len() + again) << image.cluster_bits);
        let mut bytes = vec![0; to_usize(image.cluster_size())];
        let tables = std::mem::take(&mut self.l2);
        for (at, uses) in &tables {
            self.progress.check()?;
            if let Err(e) = image.storage.read_at(*at, &[ReadBuf::new(&mut bytes)]) {
                self.report.unchecked(|| format!("the L2 table at {at:#x} cannot be read: {e}"));
            } else {
                self.table(*at, &bytes, *uses);
            }
            self.progress.advance(image.cluster_size());
        }
        self.l2 = tables;
        Ok(())
    }

    fn table(&mut self, at: u64, bytes: &[u8], uses: Uses) {
        let image = self.image;
        let size = image.cluster_size();
        let mut next = 0;
        for (index, words) in bytes.chunks_exact(image.l2_entry_len()).enumerate() {
            let l2_entry = be64(words, 0);
            let bitmap = if image.extended() { be64(words, 1) } else { 0 };
            if l2_entry == 0 && bitmap == 0 {
                continue;
            }
            let report = &mut *self.report;
            let refers = entry::l2(image, l2_entry, bitmap, |rule| {
                report.corruption(uses.all, || {
                    format!("L2 table at {at:#x}, entry {index} ({l2_entry:x}): {rule}")
                });
            });
            match refers {
                Refers::Nothing | Refers::Impossible => {}
                Refers::Compressed(host, len) => {
                    self.report.allocated_clusters += uses.active;
                    self.report.compressed_clusters += uses.active;
                    self.report.fragmented_clusters += uses.active;
                    self.add(host, len, uses.all);
                }
                Refers::Cluster(host) => {
                    self.report.allocated_clusters += uses.active;
                    if next != 0 && host != next {
                        self.report.fragmented_clusters += uses.active;
                    }
                    next = host + size;
                    if !image.data_file() {
                        self.add(host, size, uses.all);
                    }
                }
            }
        }
    }

    /// The bitmap directory and what it leads to; says whether it could be read.
    pub(super) fn bitmaps(&mut self, bitmaps: Bitmaps) -> Result<bool> {
        self.fixed("the bitmap directory", bitmaps.offset, bitmaps.bytes, false);
        let directory = self.image.read_part(bitmaps.offset, bitmaps.bytes)?;
        let Some(tables) = bitmap_tables(self.image, bitmaps, &directory) else {
            self.report.corruption(1, || "the bitmap directory breaks its rules".to_owned());
            self.report.unchecked(|| "the bitmaps cannot be read".to_owned());
            return Ok(false);
        };
        let bytes = tables.iter().map(|(offset, entries)| {
            (entries * 8).min(self.image.file_len.saturating_sub(*offset))
        });
        let bytes = bytes.fold(0, u64::saturating_add);
        if bytes > MAX_BITMAP_TABLES {
            self.report.unchecked(|| {
                format!("the tables of bitmaps have {bytes} bytes, more than {MAX_BITMAP_TABLES}")
            });
            return Ok(false);
        }
        for (offset, entries) in tables {
            self.progress.check()?;
            self.fixed("a bitmap's table", offset, entries * 8, false);
            let table = self.image.read_table(offset, entries)?;
            for word in table {
                let at = word & entry::OFFSET;
                if word & 0xff00_0000_0000_01fe != 0
                    || (at != 0 && (word & 1 != 0 || !self.image.aligned(at)))
                {
                    self.report.corruption(1, || {
                        format!("bitmap table at {offset:#x}: bad entry {word:x}")
                    });
                    self.report.unchecked(|| "the bitmaps cannot be read".to_owned());
                    return Ok(false);
                }
                if at != 0 {
                    self.add(at, self.image.cluster_size(), 1);
                }
            }
        }
        Ok(true)
    }

    fn refcount_blocks(&mut self, disk: &DiskRefcounts) {
        let image = self.image;
        for (index, block) in disk.table.iter().enumerate() {
            let at = block & super::refcounts::BLOCK_MASK;
            if block & entry::BLOCK_RESERVED != 0 {
                self.report.corruption(1, || {
                    format!("refcount table entry {index} has reserved bits set")
                });
                self.report.rebuild = true;
            } else if !image.aligned(at) {
                self.report.corruption(1, || {
                    format!("refcount block {index} is not cluster aligned; refcount table entry corrupted")
                });
                self.report.rebuild = true;
            } else if at >> image.cluster_bits >= self.counts.len() {
                self.report.corruption(1, || format!("refcount block {index} is outside image"));
                self.report.rebuild = true;
            } else if at != 0 {
                self.add(at, image.cluster_size(), 1);
                let references = self.counts.get(at >> image.cluster_bits);
                if references != 1 {
                    self.report
                        .corruption(1, || format!("refcount block {index} refcount={references}"));
                }
                // Counts of one bit cannot tell of more.
                let alone = references == 1 && !self.counts.exceeds(at >> image.cluster_bits, 1);
                self.report.rebuild |= !alone;
            }
        }
    }
}

/// The tables of all bitmaps as (offset, entries); `None` if the directory breaks its rules.
fn bitmap_tables(image: &Image<'_>, bitmaps: Bitmaps, directory: &[u8]) -> Option<Vec<(u64, u64)>> {
    if to_u64(directory.len()) < bitmaps.bytes {
        return None;
    }
    let mut tables = Vec::new();
    let mut at = 0;
    while at < directory.len() {
        let entry = directory.get(at..).filter(|rest| rest.len() >= 24)?;
        let (offset, entries) = (be64_at(entry, 0), u64::from(be32_at(entry, 8)));
        let flags = be32_at(entry, 12);
        let (kind, granularity) = (entry[16], entry[17]);
        let name = usize::from(u16::from_be_bytes([entry[18], entry[19]]));
        let extra = be32_at(entry, 20);
        let bytes = entries << image.cluster_bits;
        let bad = entries == 0
            || offset == 0
            || offset > MAX_OFFSET - entries * 8
            || !image.aligned(offset)
            || entries > 0x800_0000
            || bytes > 0x2000_0000
            || !(9..=31).contains(&granularity)
            || flags & !0b11 != 0
            || !(1..=1023).contains(&name)
            || kind != 1
            || extra != 0
            || (flags & 1 == 0 && u128::from(image.size) > (u128::from(bytes) * 8) << granularity);
        if bad {
            return None;
        }
        at += (24 + name).next_multiple_of(8);
        if at > directory.len() {
            return None;
        }
        tables.push((offset, entries));
    }
    (tables.len() == usize::try_from(bitmaps.count).ok()?).then_some(tables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WriteBuf;
    use crate::num::be_bytes;
    use crate::qcow2::check::{self, Repair, check};
    use crate::qcow2::create::{CreateOptions, create};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;

    fn write(storage: &MemoryStorage, at: u64, bytes: &[u8]) {
        storage.write_at(at, &[WriteBuf::new(bytes)]).unwrap();
    }

    /// 130 bitmaps whose tables begin at one place, each of 8 MiB.
    #[test]
    fn bitmaps_that_claim_one_place_over_and_over_are_not_read() {
        let storage = MemoryStorage::default();
        let options =
            CreateOptions { size: 1 << 20, cluster_size: Some(512), ..CreateOptions::default() };
        create(&storage, None, &options, &Progress::default()).unwrap();
        let (place, table) = (1u64 << 20, 2u64 << 20);
        let mut directory = Vec::new();
        for n in 0..130u8 {
            directory.extend(table.to_be_bytes());
            directory.extend((1u32 << 20).to_be_bytes());
            // In use; of the only type there is, with a granularity and a name of one byte.
            directory.extend([0, 0, 0, 1, 1, 16, 0, 1, 0, 0, 0, 0, n + 1]);
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let mut extension = vec![0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24, 0, 0, 0, 130, 0, 0, 0, 0];
        extension.extend(to_u64(directory.len()).to_be_bytes());
        extension.extend(place.to_be_bytes());
        extension.extend([0; 8]);
        write(&storage, place, &directory);
        storage.set_len(table + (8 << 20)).unwrap();
        write(&storage, 112, &extension);
        write(&storage, 88, &1u64.to_be_bytes());
        storage.record();
        let report = check(&storage, &check::Options::default()).unwrap();
        let said = report.findings.iter().any(|f| f.text.contains("the tables of bitmaps have"));
        assert!(said && report.check_errors == 1, "{report:?}");
        assert!(storage.recorded().len() < 1000);
    }

    /// 6000 L1 entries of which most are no cluster's offset: what they lead to lies over each other.
    #[test]
    fn not_all_of_very_many_misaligned_tables_are_read_and_a_repair_drops_them() {
        let storage = MemoryStorage::default();
        let options =
            CreateOptions { size: 12 << 30, cluster_size: Some(4096), ..CreateOptions::default() };
        create(&storage, None, &options, &Progress::default()).unwrap();
        let mut place = [0; 8];
        storage.read_at(40, &[ReadBuf::new(&mut place)]).unwrap();
        let tables: Vec<u64> = (1..=6000).map(|n| (1 << 20) + n * 512).collect();
        storage.set_len(8 << 20).unwrap();
        write(&storage, u64::from_be_bytes(place), &be_bytes(&tables));
        storage.record();
        let report = check(&storage, &check::Options::default()).unwrap();
        assert_eq!(report.check_errors, 5250 - to_u64(MAX_MISALIGNED));
        // Those of the active disk are read once more for their flags.
        assert!(storage.recorded().len() < 2 * (MAX_MISALIGNED + 750) + 100);
        let all = check::Options { repair: Repair::All, progress: None };
        assert!(check(&storage, &all).unwrap().is_clean());
    }

    /// 300 snapshots whose tables begin at one place, each of them of nearly 32 MiB.
    #[test]
    fn snapshots_that_claim_one_place_over_and_over_are_not_read() {
        let storage = MemoryStorage::default();
        let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
        create(&storage, None, &options, &Progress::default()).unwrap();
        let (table, l1) = (1u64 << 20, 2u64 << 20);
        let mut entries = Vec::new();
        for n in 0..300u32 {
            entries.extend(l1.to_be_bytes());
            entries.extend((4_194_304 - n).to_be_bytes());
            entries.extend([0; 24]);
            entries.extend(16u32.to_be_bytes());
            entries.extend([0; 16]);
        }
        storage.write_at(table, &[WriteBuf::new(&entries)]).unwrap();
        storage.set_len(l1 + (32 << 20)).unwrap();
        storage.write_at(60, &[WriteBuf::new(&300u32.to_be_bytes())]).unwrap();
        storage.write_at(64, &[WriteBuf::new(&table.to_be_bytes())]).unwrap();
        storage.record();
        let report = check(&storage, &check::Options::default()).unwrap();
        assert_eq!(report.check_errors, 1);
        assert!(storage.recorded().len() < 1000);
    }
}
