//! Mends entries that no count can make right: misaligned, outside the file, reserved bits, and
//! tables in each other's place.
//!
//! A damaged entry may lead to a cluster of data that then looks like a damaged table. Such a
//! "table" is not written to: it is the entry that leads there that is cleared.

use std::collections::{BTreeMap, BTreeSet};

use crate::num::{be_bytes, be64, to_u64, to_usize};
use crate::qcow2::header::{MAX_L1_BYTES, field};
use crate::{Progress, ReadBuf, Result, WriteBuf};

use super::super::counts::Counts;
use super::super::entry;
use super::super::image::Image;
use super::super::report::Report;
use super::super::snapshots::SnapshotL1;
use super::super::walk::Uses;
use super::append::Append;

/// Byte of the header at which the offset of the active L1 table is.
const L1_OFFSET: u64 = field::SIZE + 16;

/// What the tables hold, as counted.
pub(super) struct Found<'a> {
    pub(super) counts: &'a Counts,
    pub(super) l2: &'a BTreeMap<u64, Uses>,
}

impl Found<'_> {
    /// Whether something else refers to clusters of a table that has `own` references.
    fn shared(&self, image: &Image<'_>, at: u64, len: u64, own: u64) -> bool {
        let last = at.saturating_add(len.saturating_sub(1)) >> image.cluster_bits;
        (at >> image.cluster_bits..=last.min(self.counts.len()))
            .any(|cluster| self.counts.exceeds(cluster, own))
    }
}

/// Whether so much is wrong with a table that it is none.
fn is_bogus(bad: u64, used: u64, shared: bool) -> bool {
    bad > 0 && (shared || bad * 2 > used)
}

/// Mends L2 tables in place; gives those that are none.
pub(super) fn l2_tables(
    image: &Image<'_>,
    found: &Found<'_>,
    report: &mut Report,
    progress: &Progress,
) -> Result<BTreeSet<u64>> {
    let mut bogus = BTreeSet::new();
    let mut bytes = vec![0; to_usize(image.cluster_size())];
    for (at, uses) in found.l2 {
        progress.check()?;
        if *at == 0 || !image.aligned(*at) {
            continue;
        }
        image.storage.read_at(*at, &[ReadBuf::new(&mut bytes)])?;
        let (mut used, mut mended) = (0, Vec::new());
        for (index, words) in bytes.chunks_exact(image.l2_entry_len()).enumerate() {
            let entry = be64(words, 0);
            let bitmap = if image.extended() { be64(words, 1) } else { 0 };
            used += u64::from(entry != 0 || bitmap != 0);
            if let Some(new) = entry::mended_l2(image, entry, bitmap) {
                mended.push((index, new));
            }
        }
        let shared = found.shared(image, *at, image.cluster_size(), uses.all);
        if is_bogus(to_u64(mended.len()), used, shared) {
            bogus.insert(*at);
            continue;
        }
        for (index, (entry, bitmap)) in mended {
            let len = image.l2_entry_len();
            let mut words = entry.to_be_bytes().to_vec();
            words.extend(bitmap.to_be_bytes());
            // Within a sector: the old entry or the new one, never a mix.
            let place = at + to_u64(index * len);
            image.storage.write_at(place, &[WriteBuf::new(&words[..len])])?;
            report.repaired(|| format!("L2 table at {at:#x}, entry {index} is now {entry:x}"));
        }
    }
    Ok(bogus)
}

/// An L1 table with its bad entries cleared; the bad ones' indices, and how many are in use.
fn mended_l1(image: &Image<'_>, l1: &mut [u64], bogus: &BTreeSet<u64>) -> (Vec<usize>, u64) {
    let (mut bad, mut used) = (Vec::new(), 0);
    for (index, slot) in l1.iter_mut().enumerate().filter(|(_, entry)| **entry != 0) {
        used += 1;
        let at = *slot & entry::OFFSET;
        let good = at != 0
            && image.aligned(at)
            && !image.is_outside(at, image.cluster_size())
            && !bogus.contains(&at);
        let new = if good { *slot & !entry::L1_RESERVED } else { 0 };
        if new != *slot {
            *slot = new;
            bad.push(index);
        }
    }
    (bad, used)
}

/// Mends the active L1 table: in place, or by a copy if something else has its place or it is past
/// the end of the file. Order: the copy, flush, the header.
pub(super) fn active_l1(
    image: &Image<'_>,
    found: &Found<'_>,
    bogus: &BTreeSet<u64>,
    append: &mut Append<'_>,
    report: &mut Report,
) -> Result<()> {
    let bytes = u64::from(image.l1_size) * 8;
    let mut l1 = image.read_table(image.l1_offset, image.l1_size.into())?;
    let (bad, _) = mended_l1(image, &mut l1, bogus);
    let outside = image.is_outside(image.l1_offset, bytes);
    if bytes > 0 && (outside || found.shared(image, image.l1_offset, bytes, 1)) {
        l1.resize(to_usize(image.l1_size.into()), 0);
        let place = append.put(&be_bytes(&l1))?;
        image.storage.flush()?;
        image.storage.write_at(L1_OFFSET, &[WriteBuf::new(&place.to_be_bytes())])?;
        image.storage.flush()?;
        report.repaired(|| format!("the L1 table has a place of its own at {place:#x}"));
    } else {
        write_entries(image, image.l1_offset, &l1, &bad)?;
    }
    for index in bad {
        report.repaired(|| format!("L1 entry {index} is now {:x}", l1[index]));
    }
    Ok(())
}

/// Mends the L1 tables of snapshots in place; gives those that no disk can be had from.
pub(super) fn snapshot_l1(
    image: &Image<'_>,
    found: &Found<'_>,
    tables: &[(SnapshotL1, u64)],
    bogus: &BTreeSet<u64>,
    report: &mut Report,
) -> Result<BTreeSet<SnapshotL1>> {
    let mut lost = BTreeSet::new();
    for (table, times) in tables {
        let bytes = u64::from(table.entries) * 8;
        if bytes == 0 {
            continue;
        }
        let at = table.offset;
        if at == 0 || !image.aligned(at) || bytes > MAX_L1_BYTES || image.is_outside(at, bytes) {
            lost.insert(*table);
            continue;
        }
        let mut l1 = image.read_table(at, table.entries.into())?;
        let (bad, used) = mended_l1(image, &mut l1, bogus);
        if is_bogus(to_u64(bad.len()), used, found.shared(image, at, bytes, *times)) {
            lost.insert(*table);
            continue;
        }
        write_entries(image, at, &l1, &bad)?;
        for index in bad {
            report.repaired(|| format!("snapshot L1 table at {at:#x}: cleared entry {index}"));
        }
    }
    Ok(lost)
}

/// Writes single entries of a table.
fn write_entries(image: &Image<'_>, at: u64, table: &[u64], changed: &[usize]) -> Result<()> {
    for index in changed {
        let place = at + to_u64(*index) * 8;
        image.storage.write_at(place, &[WriteBuf::new(&table[*index].to_be_bytes())])?;
    }
    Ok(())
}
