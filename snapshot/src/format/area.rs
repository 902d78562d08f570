//! The part of the VM-state area before RAM: header and sections, written and read as one.

use vm_memory::GuestAddress;

use super::FormatError;
use super::header::{FIXED_LEN, Header, MAX_PAYLOAD, MAX_SECTIONS, SectionEntry};
use super::ram::{RamLayout, StateOffset};
use super::section::{Section, SectionName};
use crate::units::{align_up, index};

/// Payloads start at multiples of this many bytes, so that tools can look at them in place.
const PAYLOAD_ALIGN: u64 = 8;

/// Everything but the RAM itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateArea {
    /// Where RAM lies, and how long the whole area is.
    pub layout: RamLayout,
    /// The sections in stored order.
    pub sections: Vec<Section>,
}

impl StateArea {
    /// Lays out a machine with RAM `regions` (guest physical address, length in bytes; sorted) and
    /// `sections`.
    pub fn new(
        regions: &[(GuestAddress, u64)],
        sections: Vec<Section>,
    ) -> Result<Self, FormatError> {
        if sections.len() > MAX_SECTIONS {
            let reason = format!("{} sections, at most {MAX_SECTIONS} fit", sections.len());
            return Err(FormatError::Header(reason));
        }
        let mut end = Header::length(regions.len(), sections.len()) as u64;
        let mut payload = 0;
        for (at, section) in sections.iter().enumerate() {
            section.check_writable()?;
            if sections[..at].iter().any(|s| s.name == section.name) {
                return Err(FormatError::Duplicate(section.name.clone()));
            }
            payload += section.bytes.len() as u64;
            end = end.next_multiple_of(PAYLOAD_ALIGN) + section.bytes.len() as u64;
            if payload > MAX_PAYLOAD {
                return Err(FormatError::Encode {
                    name: section.name.clone(),
                    reason: "the sections together are larger than 256 MiB".to_owned(),
                });
            }
        }
        let start = RamLayout::start_after(end)
            .ok_or_else(|| FormatError::Header("it is too large".to_owned()))?;
        let layout = RamLayout::new(start, regions.iter().copied())?;
        Ok(Self { layout, sections })
    }

    /// The same with RAM in a place that was decided before the sections were known.
    pub(crate) fn with_ram_at(
        start: StateOffset,
        regions: &[(GuestAddress, u64)],
        sections: Vec<Section>,
    ) -> Result<Self, FormatError> {
        let mut area = Self::new(regions, sections)?;
        if area.layout.start() > start {
            let text = format!("the sections reach into RAM, which starts at {:#x}", start.0);
            return Err(FormatError::Header(text));
        }
        area.layout = RamLayout::new(start, regions.iter().copied())?;
        Ok(area)
    }

    /// The bytes to store from offset 0. What lies between their end and RAM reads as zeroes.
    pub fn encode(&self) -> Vec<u8> {
        let regions = self.layout.regions().len();
        let mut end = Header::length(regions, self.sections.len()) as u64;
        let mut entries = Vec::with_capacity(self.sections.len());
        for section in &self.sections {
            let offset = end.next_multiple_of(PAYLOAD_ALIGN);
            let len = section.bytes.len() as u64;
            entries.push(SectionEntry {
                name: section.name.clone(),
                version: section.version,
                offset: StateOffset(offset),
                len,
                crc: crc32fast::hash(&section.bytes),
            });
            end = offset + len;
        }
        let header = Header { layout: self.layout.clone(), sections: entries };
        let mut out = header.encode();
        out.reserve_exact(index(end) - out.len());
        for (entry, section) in header.sections.iter().zip(&self.sections) {
            out.resize(index(entry.offset.0), 0);
            out.extend_from_slice(&section.bytes);
        }
        out
    }

    /// Reads and checks all of it from an area of `area_len` bytes through `read_at` (offset,
    /// buffer to fill). Every checksum is verified; memory is bounded by the format's limits.
    pub fn read(
        area_len: u64,
        read_at: impl Fn(StateOffset, &mut [u8]) -> block::Result<()>,
    ) -> Result<Self, FormatError> {
        let header = read_header(area_len, &read_at)?;
        let sections = header.sections.into_iter().map(|entry| read_payload(entry, &read_at));
        Ok(Self { sections: sections.collect::<Result<_, _>>()?, layout: header.layout })
    }

    /// As [`StateArea::read`], of the header and the first section of `kind` only, which has at most
    /// `most` bytes.
    pub(crate) fn read_section(
        area_len: u64,
        kind: &str,
        most: u64,
        read_at: impl Fn(StateOffset, &mut [u8]) -> block::Result<()>,
    ) -> Result<Section, FormatError> {
        let header = read_header(area_len, &read_at)?;
        let name = SectionName::new(kind, 0);
        match header.sections.into_iter().find(|entry| entry.name == name) {
            Some(SectionEntry { name, len, .. }) if len > most => {
                let reason = format!("it has {len} bytes, at most {most} are possible");
                Err(FormatError::Section { name, reason })
            }
            Some(entry) => read_payload(entry, &read_at),
            None => Err(FormatError::Missing(name)),
        }
    }

    /// The stored bytes rounded up to whole clusters of the image.
    pub(crate) fn encode_padded(&self, cluster: u64) -> Vec<u8> {
        let mut bytes = self.encode();
        let len = align_up(bytes.len() as u64, cluster).unwrap_or(bytes.len() as u64);
        bytes.resize(index(len), 0);
        bytes
    }
}

/// Reads from the area; an error names what was being read.
fn read_named(
    read_at: &impl Fn(StateOffset, &mut [u8]) -> block::Result<()>,
    what: impl Fn() -> String,
    offset: StateOffset,
    buffer: &mut [u8],
) -> Result<(), FormatError> {
    read_at(offset, buffer)
        .map_err(|source| FormatError::Read { what: what(), source: Box::new(source) })
}

fn read_header(
    area_len: u64,
    read_at: &impl Fn(StateOffset, &mut [u8]) -> block::Result<()>,
) -> Result<Header, FormatError> {
    let name = || "the VM-state header".to_owned();
    if area_len < FIXED_LEN as u64 {
        return Err(FormatError::Truncated {
            what: "the header".to_owned(),
            need: FIXED_LEN as u64,
            have: area_len,
        });
    }
    let mut fixed = [0; FIXED_LEN];
    read_named(read_at, name, StateOffset(0), &mut fixed)?;
    let mut bytes = vec![0; Header::probe(&fixed, area_len)?];
    read_named(read_at, name, StateOffset(0), &mut bytes)?;
    Header::decode(&bytes, area_len)
}

fn read_payload(
    entry: SectionEntry,
    read_at: &impl Fn(StateOffset, &mut [u8]) -> block::Result<()>,
) -> Result<Section, FormatError> {
    let mut bytes = vec![0; index(entry.len)];
    let what = || format!("VM-state section '{}'", entry.name);
    read_named(read_at, what, entry.offset, &mut bytes)?;
    if crc32fast::hash(&bytes) != entry.crc {
        return Err(FormatError::Section {
            name: entry.name,
            reason: "its checksum is wrong".to_owned(),
        });
    }
    Ok(Section { name: entry.name, version: entry.version, bytes })
}
