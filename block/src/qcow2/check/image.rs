//! What a check needs of the header, read more tolerantly than for opening: a table that lies
//! outside the file is something to report (or repair), not a reason to give up.

use crate::num::{be32_at, be64, be64_at, to_usize};
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result};

use super::super::header::{
    MAX_L1_BYTES, MAX_REFTABLE_BYTES, check_backing_place, check_magic, compression, features,
    geometry, incompatible,
};
use super::super::layout::Geometry;

/// Autoclear bit: the bitmaps extension is up to date.
pub(super) const BITMAPS_VALID: u64 = 1;
const BITMAPS_EXTENSION: u32 = 0x2385_2875;
/// Most bitmaps, and most bytes of their directory (QEMU's QCOW2_MAX_BITMAPS and
/// QCOW2_MAX_BITMAP_DIRECTORY_SIZE).
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 1024 * 65535;
/// File offsets are signed in QEMU.
pub(super) const MAX_OFFSET: u64 = i64::MAX as u64;

/// Where the bitmap directory is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bitmaps {
    pub(super) count: u32,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// The fields of the header.
#[derive(Debug)]
pub(super) struct Image<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) file_len: u64,
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) size: u64,
    pub(super) l1_size: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) autoclear: u64,
    pub(super) bitmaps: Option<Bitmaps>,
}

impl<'a> Image<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::NotFormat`], [`Error::NotSupported`] or [`Error::Corrupt`] where QEMU cannot open
    /// the image for a check either.
    pub(super) fn open(storage: &'a dyn Storage) -> Result<Self> {
        let file_len = storage.len()?;
        let mut fixed = [0; 112];
        storage.read_at(0, &[ReadBuf::new(&mut fixed)])?;
        check_magic(storage.name(), &fixed, file_len)?;
        let (geometry, header_length) = geometry(&fixed, storage.name(), file_len)?;
        let Geometry { version, cluster_bits, refcount_order, .. } = geometry;
        let unsupported =
            |what: String| Error::NotSupported(format!("Image '{}' {what}", storage.name()));
        let features = |at| features(&fixed, version, at);
        let mut image = Self {
            storage,
            file_len,
            version,
            cluster_bits,
            refcount_order,
            size: be64_at(&fixed, 24),
            l1_size: be32_at(&fixed, 36),
            l1_offset: be64_at(&fixed, 40),
            reftable_offset: be64_at(&fixed, 48),
            reftable_clusters: be32_at(&fixed, 56),
            snapshots: be32_at(&fixed, 60),
            snapshots_offset: be64_at(&fixed, 64),
            incompatible: features(72),
            autoclear: features(88),
            bitmaps: None,
        };
        let known = incompatible::DIRTY
            | incompatible::CORRUPT
            | incompatible::DATA_FILE
            | incompatible::COMPRESSION
            | incompatible::EXTENDED_L2;
        if image.incompatible & !known != 0 {
            let bits = image.incompatible & !known;
            return Err(unsupported(format!("uses unknown incompatible features {bits:#x}")));
        }
        image
            .check_sizes()
            .and_then(|()| {
                let (offset, len) = (be64_at(&fixed, 8), be32_at(&fixed, 16));
                check_backing_place(offset, len, image.cluster_size())
            })
            .map_err(|reason| image.corrupt(reason))?;
        compression(image.incompatible, header_length, fixed[104]).map_err(unsupported)?;
        image.read_extensions(header_length, be64_at(&fixed, 8))?;
        Ok(image)
    }

    fn check_sizes(&self) -> std::result::Result<(), String> {
        self.check_table(
            "refcount table",
            self.reftable_offset,
            self.reftable_bytes(),
            MAX_REFTABLE_BYTES,
        )?;
        let l1_bytes = u64::from(self.l1_size) * 8;
        self.check_table("L1 table", self.l1_offset, l1_bytes, MAX_L1_BYTES)?;
        let coverage = self.cluster_bits + self.cluster_bits - if self.extended() { 4 } else { 3 };
        let entries = (u128::from(self.size) + (1 << coverage) - 1) >> coverage;
        if entries > u128::from(self.l1_size) {
            return Err(format!("l1_size is {}, {entries} entries are needed", self.l1_size));
        }
        Ok(())
    }

    /// A place for a table that QEMU would accept.
    pub(super) fn check_table(
        &self,
        what: &str,
        offset: u64,
        bytes: u64,
        most: u64,
    ) -> std::result::Result<(), String> {
        if bytes > most {
            return Err(format!("{what} too large"));
        }
        if offset > MAX_OFFSET - bytes || !offset.is_multiple_of(self.cluster_size()) {
            return Err(format!("{what} offset invalid"));
        }
        Ok(())
    }

    fn read_extensions(&mut self, header_length: u32, end: u64) -> Result<()> {
        let mut first = vec![0; to_usize(self.cluster_size())];
        self.storage.read_at(0, &[ReadBuf::new(&mut first)])?;
        if end != 0 {
            first.truncate(to_usize(end.min(self.cluster_size())));
        }
        let mut at = to_usize(header_length.into());
        while at + 8 <= first.len() {
            let (kind, len) = (be32_at(&first, at), to_usize(be32_at(&first, at + 4).into()));
            if kind == 0 {
                break;
            }
            let Some(data) = first.get(at + 8..).and_then(|rest| rest.get(..len)) else {
                return Err(self.corrupt(format!("header extension {kind:#x} is too large")));
            };
            if kind == BITMAPS_EXTENSION && self.autoclear & BITMAPS_VALID != 0 && self.version >= 3
            {
                self.bitmaps = Some(self.bitmaps_of(data)?);
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    fn bitmaps_of(&self, data: &[u8]) -> Result<Bitmaps> {
        let bitmaps =
            Bitmaps { count: be32_at(data, 0), bytes: be64_at(data, 8), offset: be64_at(data, 16) };
        let wrong = data.len() != 24
            || be32_at(data, 4) != 0
            || !(1..=MAX_BITMAPS).contains(&bitmaps.count)
            || !(1..=MAX_DIRECTORY).contains(&bitmaps.bytes)
            || bitmaps.offset == 0
            || !bitmaps.offset.is_multiple_of(self.cluster_size());
        if wrong {
            return Err(self.corrupt("the bitmaps extension breaks its rules".to_owned()));
        }
        Ok(bitmaps)
    }

    pub(super) fn corrupt(&self, reason: String) -> Error {
        Error::Corrupt { filename: self.storage.name().to_owned(), reason }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters of the file, the last perhaps cut short.
    pub(super) fn clusters(&self) -> u64 {
        self.file_len.div_ceil(self.cluster_size())
    }

    pub(super) fn aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
    }

    /// Whether L2 entries have a bitmap of subclusters.
    pub(super) fn extended(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether the guest's data is in another file.
    pub(super) fn data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_len(&self) -> usize {
        if self.extended() { 16 } else { 8 }
    }

    /// Largest refcount.
    pub(super) fn max_refcount(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        }
    }

    /// Counts in a refcount block.
    pub(super) fn block_entries(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// The file's length as QEMU counts it: the rest of its last sector reads as zeroes.
    fn whole_sectors(&self) -> u64 {
        self.file_len.next_multiple_of(512)
    }

    /// Bytes of a table of which the file has only a part: what is past its end reads as zeroes
    /// and need not be looked at.
    pub(super) fn read_part(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let len = len.min(self.whole_sectors().saturating_sub(offset));
        let mut bytes = vec![0; to_usize(len)];
        self.storage.read_at(offset, &[ReadBuf::new(&mut bytes)])?;
        Ok(bytes)
    }

    /// A table of u64, as far as the file has it.
    pub(super) fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>> {
        let mut bytes = self.read_part(offset, entries * 8)?;
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Ok((0..bytes.len() / 8).map(|index| be64(&bytes, index)).collect())
    }

    /// Place and bytes of a compressed cluster.
    pub(super) fn compressed(&self, entry: u64) -> (u64, u64) {
        let offset_bits = 62 - (self.cluster_bits - 8);
        let host = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & ((1 << 62) - 1)) >> offset_bits) + 1;
        (host, sectors * 512 - host % 512)
    }

    /// Whether a range goes past the end of the file by a cluster or more: the last cluster may be
    /// cut short, nothing may start after it.
    pub(super) fn is_outside(&self, offset: u64, len: u64) -> bool {
        let file_len = self.whole_sectors();
        match len.checked_sub(1).map(|n| offset.saturating_add(n)) {
            Some(last) => last >= file_len && last - file_len + 1 >= self.cluster_size(),
            None => false,
        }
    }

    /// Bytes of the refcount table.
    pub(super) fn reftable_bytes(&self) -> u64 {
        u64::from(self.reftable_clusters) << self.cluster_bits
    }
}
