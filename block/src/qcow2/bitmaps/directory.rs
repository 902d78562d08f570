//! The bitmaps extension and the bitmap directory ("Bitmaps" of the specification), as bytes.

use std::collections::HashSet;

use crate::bitmap::Granularity;
use crate::num::{be16_at, be32_at, be64_at, to_u64, to_usize};
use crate::qcow2::layout::{Geometry, OFFSET_MASK};

/// Most bitmaps (QEMU's QCOW2_MAX_BITMAPS).
pub(super) const MAX_BITMAPS: usize = 65535;
/// Most bytes of a directory (QEMU's QCOW2_MAX_BITMAP_DIRECTORY_SIZE).
pub(super) const MAX_DIRECTORY: u64 = 1024 * 65535;
/// Most bytes that a bitmap takes in clusters (QEMU's BME_MAX_PHYS_SIZE).
pub(super) const MAX_DATA: u64 = 512 << 20;
/// Longest name in bytes (QEMU's BME_MAX_NAME_SIZE).
pub(super) const MAX_NAME: usize = 1023;
/// Bytes of an entry before its extra data.
const FIXED: usize = 24;
/// Where the flags are in an entry.
const FLAGS: usize = 12;
/// The type of a dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;

/// Entry flags.
pub(super) mod flag {
    /// Not stored properly: it may be out of date.
    pub(in crate::qcow2) const IN_USE: u32 = 1;
    /// It has to follow every write.
    pub(in crate::qcow2) const AUTO: u32 = 2;
    /// It can be used without understanding its extra data.
    pub(in crate::qcow2) const EXTRA_COMPATIBLE: u32 = 4;
}

/// The data of the header extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extension {
    pub(super) count: u32,
    /// Bytes of the directory.
    pub(super) size: u64,
    /// Host offset of the directory.
    pub(super) offset: u64,
}

/// What a check says: which rule is broken.
pub(super) type Check<T> = Result<T, String>;

impl Extension {
    pub(super) fn decode(data: &[u8], geometry: Geometry, file_len: u64) -> Check<Self> {
        if data.len() != 24 {
            return Err(format!("its header extension has {} bytes instead of 24", data.len()));
        }
        if be32_at(data, 4) != 0 {
            return Err("the reserved field of its header extension is not zero".to_owned());
        }
        let this =
            Self { count: be32_at(data, 0), size: be64_at(data, 8), offset: be64_at(data, 16) };
        if this.count == 0 || to_usize(this.count.into()) > MAX_BITMAPS {
            return Err(format!("{} bitmaps, must be 1 to {MAX_BITMAPS}", this.count));
        }
        if this.size > MAX_DIRECTORY || this.size < u64::from(this.count) * to_u64(FIXED) {
            return Err(format!("a directory of {} bytes for {}", this.size, this.count));
        }
        check_place("directory", this.offset, this.size, geometry, file_len)?;
        Ok(this)
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut data = Vec::with_capacity(24);
        data.extend(self.count.to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.size.to_be_bytes());
        data.extend(self.offset.to_be_bytes());
        data
    }
}

/// Refuses a place that is not in the file, or in its first cluster, or not cluster aligned.
pub(super) fn check_place(
    what: &str,
    offset: u64,
    bytes: u64,
    geometry: Geometry,
    file_len: u64,
) -> Check<()> {
    if offset == 0 || offset & !OFFSET_MASK != 0 || geometry.in_cluster(offset) != 0 {
        return Err(format!("its {what} offset {offset:#x} is not a cluster offset"));
    }
    if offset.checked_add(bytes).is_none_or(|end| end > file_len) {
        return Err(format!(
            "its {what} at {offset:#x} ({bytes} bytes) is beyond the end of the file ({file_len} bytes); is the file truncated?"
        ));
    }
    Ok(())
}

/// An entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::qcow2) struct Entry {
    pub(super) table_offset: u64,
    /// Entries of the bitmap's table.
    pub(super) table_size: u32,
    pub(super) flags: u32,
    pub(super) granularity: Granularity,
    pub(super) name: Vec<u8>,
    /// Extra data, kept as it is.
    pub(super) extra: Vec<u8>,
}

impl Entry {
    pub(super) fn in_use(&self) -> bool {
        self.flags & flag::IN_USE != 0
    }

    /// Its name, if it can be called by it and we may use it: extra data that is not known is left
    /// alone together with its bitmap, unless the entry says that it does not matter.
    pub(super) fn usable_name(&self) -> Option<&str> {
        let compatible = self.extra.is_empty() || self.flags & flag::EXTRA_COMPATIBLE != 0;
        std::str::from_utf8(&self.name).ok().filter(|_| compatible)
    }

    /// Bytes of the table.
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.table_size) * 8
    }

    fn bytes(&self) -> usize {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let end = out.len() + self.bytes();
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes();
        out.extend(self.table_offset.to_be_bytes());
        out.extend(self.table_size.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out.push(DIRTY_TRACKING);
        out.extend(u8::try_from(self.granularity.bits()));
        out.extend(&len(&self.name)[2..]);
        out.extend(len(&self.extra));
        out.extend(&self.extra);
        out.extend(&self.name);
        out.resize(end, 0);
    }

    /// Decodes the first entry of `bytes`; gives it with its length.
    fn decode(bytes: &[u8]) -> Check<(Self, usize)> {
        let cut = || "is longer than the directory".to_owned();
        let fixed = bytes.get(..FIXED).ok_or_else(cut)?;
        let name_len = usize::from(be16_at(fixed, 18));
        let extra_len = to_usize(be32_at(fixed, 20).into());
        let len = FIXED.checked_add(extra_len).and_then(|n| n.checked_add(name_len));
        let padded = len.and_then(|n| n.checked_next_multiple_of(8)).ok_or_else(cut)?;
        // The padding of the last entry may be missing.
        let (extra, name) = len
            .and_then(|len| bytes.get(FIXED..len))
            .and_then(|rest| rest.split_at_checked(extra_len))
            .ok_or_else(cut)?;
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(format!("has a name of {} bytes, must be 1 to {MAX_NAME}", name.len()));
        }
        if fixed[16] != DIRTY_TRACKING {
            return Err(format!("is of unknown type {}", fixed[16]));
        }
        let granularity = Granularity::from_bits(fixed[17].into())
            .ok_or_else(|| format!("has granularity_bits {}, must be 9 to 31", fixed[17]))?;
        let flags = be32_at(fixed, FLAGS);
        if flags >> 3 != 0 {
            return Err(format!("has reserved flags ({flags:#x})"));
        }
        let entry = Self {
            table_offset: be64_at(fixed, 0),
            table_size: be32_at(fixed, 8),
            flags,
            granularity,
            name: name.to_vec(),
            extra: extra.to_vec(),
        };
        Ok((entry, padded.min(bytes.len())))
    }

    /// Checks the table's place and size.
    fn check(&self, geometry: Geometry, disk_size: u64, file_len: u64) -> Check<()> {
        if self.table_size == 0 {
            return Err("has no table".to_owned());
        }
        let data = u64::from(self.table_size) << geometry.cluster_bits;
        if data > MAX_DATA.max(geometry.cluster_size()) {
            return Err(format!("has a table of {} entries, too large", self.table_size));
        }
        check_place("bitmap table", self.table_offset, self.table_bytes(), geometry, file_len)?;
        // One that is not up to date may belong to a disk of another size.
        let wanted = table_entries(self.granularity, disk_size, geometry);
        if !self.in_use() && u64::from(self.table_size) != wanted {
            return Err(format!(
                "has a table of {} entries, a disk of {disk_size} bytes needs {wanted}",
                self.table_size
            ));
        }
        Ok(())
    }
}

/// Entries of the table of a bitmap over a disk of `size` bytes.
pub(super) fn table_entries(granularity: Granularity, size: u64, geometry: Geometry) -> u64 {
    geometry.clusters(granularity.count(size).div_ceil(8))
}

/// Decodes and checks a directory.
pub(super) fn decode(
    bytes: &[u8],
    count: u32,
    geometry: Geometry,
    disk_size: u64,
    file_len: u64,
) -> Check<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    let mut rest = bytes;
    for index in 0..count {
        let wrong = |why: String| format!("directory entry {index} {why}");
        let (entry, len) = Entry::decode(rest).map_err(wrong)?;
        entry
            .check(geometry, disk_size, file_len)
            .map_err(|why| format!("bitmap '{}' {why}", String::from_utf8_lossy(&entry.name)))?;
        if !names.insert(entry.name.clone()) {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            return Err(format!("two bitmaps are called '{name}'"));
        }
        rest = &rest[len..];
        entries.push(entry);
    }
    match rest.is_empty() {
        true => Ok(entries),
        false => Err(format!("the directory has {} bytes after its last entry", rest.len())),
    }
}

/// The directory as it is in the image.
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.iter().map(Entry::bytes).sum());
    entries.iter().for_each(|entry| entry.encode(&mut out));
    out
}

/// Where the flags of each entry are, from the start of the directory.
pub(super) fn flag_places(entries: &[Entry]) -> impl Iterator<Item = u64> {
    entries.iter().scan(0, |at, entry| {
        let place = *at + FLAGS;
        *at += entry.bytes();
        Some(to_u64(place))
    })
}

/// Bytes of a directory with these entries and one more of that name.
pub(super) fn size_with(entries: &[Entry], name: &str) -> u64 {
    let old: usize = entries.iter().map(Entry::bytes).sum();
    to_u64(old + (FIXED + name.len()).next_multiple_of(8))
}
