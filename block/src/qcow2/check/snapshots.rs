//! The snapshot table, as a check reads it: limits apply, its entries need not make sense.

use crate::Result;
use crate::num::{be16_at, be32_at, be64_at, to_u64};

use super::image::Image;
use super::report::Report;

/// Most snapshots, bytes of the table, bytes of extra data of an entry (QEMU's limits).
pub(super) const MAX_SNAPSHOTS: u64 = 65536;
pub(super) const MAX_TABLE: u64 = 64 << 20;
pub(super) const MAX_EXTRA: u32 = 1024;
pub(super) const FIXED: u64 = 40;
/// Extra data that every entry of a version 3 image has: VM-state size and disk size.
pub(super) const NEEDED_EXTRA: u32 = 16;

/// Where a snapshot's L1 table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SnapshotL1 {
    pub(super) offset: u64,
    pub(super) entries: u32,
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct SnapshotTable {
    pub(super) l1: Vec<SnapshotL1>,
    /// Bytes in the file.
    pub(super) bytes: u64,
    /// Entries that lack extra data a version 3 image needs.
    pub(super) incomplete: Vec<usize>,
}

impl SnapshotTable {
    /// Reads the table; `None` if that cannot be done, which the report tells.
    pub(super) fn read(image: &Image<'_>, report: &mut Report) -> Result<Option<Self>> {
        let (count, start) = (u64::from(image.snapshots), image.snapshots_offset);
        if let Err(e) =
            image.check_table("snapshot table", start, count * FIXED, MAX_SNAPSHOTS * FIXED)
        {
            report.unchecked(|| e);
            return Ok(None);
        }
        let mut table = Self::default();
        let mut at = start;
        for index in 0..image.snapshots {
            at = at.next_multiple_of(8);
            if at >= image.file_len {
                // Past the end of the file all reads as zeroes: an empty entry each.
                return Ok(Some(table.with_empty(image, report, index, at - start)));
            }
            let mut fixed = image.read_part(at, FIXED)?;
            fixed.resize(40, 0);
            let extra = be32_at(&fixed, 36);
            if extra > MAX_EXTRA {
                report.unchecked(|| {
                    format!("Too much extra metadata in snapshot table entry {index}")
                });
                return Ok(None);
            }
            let names = u64::from(be16_at(&fixed, 12)) + u64::from(be16_at(&fixed, 14));
            at += FIXED + u64::from(extra) + names;
            if at - start > MAX_TABLE {
                report.unchecked(|| "Snapshot table is too big".to_owned());
                return Ok(None);
            }
            table.push(image, report, be64_at(&fixed, 0), be32_at(&fixed, 8), extra);
        }
        table.bytes = at - start;
        Ok(Some(table))
    }

    fn push(
        &mut self,
        image: &Image<'_>,
        report: &mut Report,
        offset: u64,
        entries: u32,
        extra: u32,
    ) {
        if image.version >= 3 && extra < NEEDED_EXTRA {
            let index = self.l1.len();
            report.corruption(1, || format!("snapshot table entry {index} is incomplete"));
            self.incomplete.push(index);
        }
        self.l1.push(SnapshotL1 { offset, entries });
    }

    fn with_empty(mut self, image: &Image<'_>, report: &mut Report, from: u32, bytes: u64) -> Self {
        for _ in from..image.snapshots {
            self.push(image, report, 0, 0, 0);
        }
        self.bytes = bytes + u64::from(image.snapshots - from) * FIXED;
        self
    }

    /// Each L1 table once, with how many snapshots have it.
    pub(super) fn distinct(&self) -> Vec<(SnapshotL1, u64)> {
        let mut all = self.l1.clone();
        all.sort_unstable();
        all.chunk_by(|a, b| a == b).map(|same| (same[0], to_u64(same.len()))).collect()
    }
}
