//! The header with its two tables: readable without decoding anything else.
//!
//! All numbers are little endian. The checksum is CRC-32 (IEEE 802.3, as in zlib) over the header
//! and both tables, with the checksum field taken as zero.

use vm_memory::GuestAddress;

use super::ram::{MAX_REGIONS, RamLayout, StateOffset};
use super::section::{MAX_KIND, MAX_SECTION, SectionName};
use super::{FormatError, OLDEST_VERSION, VERSION};

/// First bytes of the VM-state area. The last one makes a text tool stop.
pub const MAGIC: [u8; 8] = *b"TARDIVM\x1a";

/// First bytes of a QEMU migration stream, which QEMU keeps in the same place.
const QEMU_MAGIC: [u8; 4] = *b"QEVM";

/// Length of the fixed part of the header in bytes.
pub(crate) const FIXED_LEN: usize = 64;
/// Length of one entry of the RAM region table in bytes.
pub(crate) const REGION_LEN: usize = 24;
/// Length of one entry of the section table in bytes.
pub(crate) const ENTRY_LEN: usize = 80;
/// Most sections.
pub(crate) const MAX_SECTIONS: usize = 1024;
/// Most bytes of all payloads together.
pub const MAX_PAYLOAD: u64 = 256 << 20;

const CRC_AT: usize = 60;

/// One entry of the section table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionEntry {
    /// What the section is of.
    pub name: SectionName,
    /// Version of its payload.
    pub version: u32,
    /// Where the payload starts.
    pub offset: StateOffset,
    /// Length of the payload in bytes.
    pub len: u64,
    /// CRC-32 of the payload.
    pub crc: u32,
}

/// The header and its tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Where guest RAM lies; also gives the length of the whole area.
    pub layout: RamLayout,
    /// The sections in the order of their payloads.
    pub sections: Vec<SectionEntry>,
}

impl Header {
    /// Length of a header with these many table entries, in bytes.
    pub fn length(regions: usize, sections: usize) -> usize {
        FIXED_LEN + regions * REGION_LEN + sections * ENTRY_LEN
    }

    /// The header as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let regions = self.layout.regions();
        let length = Self::length(regions.len(), self.sections.len());
        let mut out = Vec::with_capacity(length);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        // Counts are limited far below 32 bits where layouts and sections are made.
        out.extend(small(length).to_le_bytes());
        out.extend(self.layout.total_length().to_le_bytes());
        out.extend(self.layout.start().0.to_le_bytes());
        out.extend(small(regions.len()).to_le_bytes());
        out.extend(small(self.sections.len()).to_le_bytes());
        out.resize(FIXED_LEN, 0);
        for region in regions {
            out.extend(region.start.0.to_le_bytes());
            out.extend(region.len.to_le_bytes());
            out.extend(region.offset.0.to_le_bytes());
        }
        for section in &self.sections {
            let end = out.len() + MAX_KIND;
            out.extend(section.name.kind().as_bytes());
            out.resize(end, 0);
            out.extend(section.name.instance().to_le_bytes());
            out.extend(section.version.to_le_bytes());
            out.extend(section.offset.0.to_le_bytes());
            out.extend(section.len.to_le_bytes());
            out.extend(section.crc.to_le_bytes());
            out.extend([0; 4]);
        }
        let crc = checksum(&out);
        out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Length in bytes of the whole header that starts with `fixed`, after checking all that tells
    /// whether this program can read it. `area_len` is the length of the VM-state area.
    pub fn probe(fixed: &[u8; FIXED_LEN], area_len: u64) -> Result<usize, FormatError> {
        let magic: [u8; 8] = array(fixed, 0);
        if magic[..4] == QEMU_MAGIC {
            return Err(FormatError::MadeByQemu);
        }
        if magic != MAGIC {
            return Err(FormatError::UnknownMagic(magic));
        }
        let found = u32_at(fixed, 8);
        if !(OLDEST_VERSION..=VERSION).contains(&found) {
            return Err(FormatError::Version { found });
        }
        let (regions, sections) = (u32_at(fixed, 32) as usize, u32_at(fixed, 36) as usize);
        if regions > MAX_REGIONS || sections > MAX_SECTIONS {
            return Err(damaged(format!(
                "{regions} RAM regions and {sections} sections; at most {MAX_REGIONS} and {MAX_SECTIONS} are possible"
            )));
        }
        let length = Self::length(regions, sections);
        if u32_at(fixed, 12) as usize != length {
            return Err(damaged(format!(
                "its length is {} bytes, its tables take {length}",
                u32_at(fixed, 12)
            )));
        }
        if length as u64 > area_len {
            return Err(FormatError::Truncated {
                what: "the header".to_owned(),
                need: length as u64,
                have: area_len,
            });
        }
        Ok(length)
    }

    /// Decodes a whole header; `bytes` has the length that [`Header::probe`] gave. `area_len` is
    /// the length of the VM-state area in bytes.
    pub fn decode(bytes: &[u8], area_len: u64) -> Result<Self, FormatError> {
        let fixed: [u8; FIXED_LEN] =
            bytes.first_chunk().copied().ok_or_else(|| damaged("it is too short".to_owned()))?;
        if Self::probe(&fixed, area_len)? != bytes.len() {
            return Err(damaged("its length is wrong".to_owned()));
        }
        if u32_at(bytes, CRC_AT) != checksum(bytes) {
            return Err(damaged("its checksum is wrong".to_owned()));
        }
        if fixed[40..CRC_AT].iter().any(|&byte| byte != 0) {
            return Err(damaged("reserved bytes are not zero".to_owned()));
        }
        let (total, ram_start) = (u64_at(bytes, 16), u64_at(bytes, 24));
        if total > area_len {
            return Err(FormatError::Truncated {
                what: "the machine".to_owned(),
                need: total,
                have: area_len,
            });
        }
        if total != area_len {
            return Err(damaged(format!("it tells of {total} bytes, the snapshot has {area_len}")));
        }
        let regions = u32_at(bytes, 32) as usize;
        let (tables, entries) = bytes[FIXED_LEN..].split_at(regions * REGION_LEN);
        let layout = decode_layout(ram_start, total, tables)?;
        let sections = decode_entries(bytes.len() as u64, ram_start, entries)?;
        Ok(Self { layout, sections })
    }
}

fn decode_layout(start: u64, total: u64, table: &[u8]) -> Result<RamLayout, FormatError> {
    let rows = table.chunks_exact(REGION_LEN);
    let ranges = rows.clone().map(|row| (GuestAddress(u64_at(row, 0)), u64_at(row, 8)));
    let layout = RamLayout::new(StateOffset(start), ranges)?;
    // The offsets follow from the regions; a table that tells others was not written by the rule.
    let stored = rows.map(|row| StateOffset(u64_at(row, 16)));
    if !stored.eq(layout.regions().iter().map(|region| region.offset)) {
        return Err(damaged("RAM offsets do not follow from the regions".into()));
    }
    if layout.total_length() != total {
        return Err(damaged(format!(
            "RAM ends at {}, the VM state at {total}",
            layout.total_length()
        )));
    }
    Ok(layout)
}

fn decode_entries(
    header_len: u64,
    ram_start: u64,
    table: &[u8],
) -> Result<Vec<SectionEntry>, FormatError> {
    let mut sections: Vec<SectionEntry> = Vec::new();
    let (mut end, mut payload) = (header_len, 0);
    for row in table.chunks_exact(ENTRY_LEN) {
        let entry = decode_entry(row)?;
        let broken = |reason: &str| FormatError::Section {
            name: entry.name.clone(),
            reason: reason.to_owned(),
        };
        if sections.iter().any(|other| other.name == entry.name) {
            return Err(FormatError::Duplicate(entry.name));
        }
        payload += entry.len.min(MAX_SECTION + 1);
        if entry.len > MAX_SECTION || payload > MAX_PAYLOAD {
            return Err(broken("it is larger than the format allows"));
        }
        if entry.offset.0 < end {
            return Err(broken("it overlaps what comes before it"));
        }
        end = match entry.offset.0.checked_add(entry.len) {
            Some(end) if end <= ram_start => end,
            _ => return Err(broken("it reaches into the RAM part")),
        };
        sections.push(entry);
    }
    Ok(sections)
}

fn decode_entry(row: &[u8]) -> Result<SectionEntry, FormatError> {
    let kind = &row[..MAX_KIND];
    let len = kind.iter().position(|&b| b == 0).unwrap_or(MAX_KIND);
    let padded = kind[len..].iter().all(|&byte| byte == 0);
    let kind = String::from_utf8_lossy(&kind[..len]);
    let name = SectionName::new(kind, u32_at(row, 48));
    if !padded || !name.is_valid() || u32_at(row, 76) != 0 {
        let name = name.to_string();
        return Err(damaged(format!("the section table has the entry {name:?}")));
    }
    Ok(SectionEntry {
        name,
        version: u32_at(row, 52),
        offset: StateOffset(u64_at(row, 56)),
        len: u64_at(row, 64),
        crc: u32_at(row, 72),
    })
}

fn checksum(header: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..CRC_AT]);
    hasher.update(&[0; 4]);
    hasher.update(&header[CRC_AT + 4..]);
    hasher.finalize()
}

fn damaged(reason: String) -> FormatError {
    FormatError::Header(reason)
}

fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}
