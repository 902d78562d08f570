//! The format against its document: round trips, every kind of damage, a pinned version 1.

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::area::StateArea;
use super::header::{ENTRY_LEN, FIXED_LEN, Header, MAGIC, REGION_LEN};
use super::ram::{LayoutError, RamLayout, StateOffset};
use super::section::{Section, SectionName, SectionReader};
use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Registers {
    rip: u64,
    flags: Vec<bool>,
}

const MIB: u64 = 1 << 20;

fn registers() -> Registers {
    Registers { rip: 0x100_0000, flags: vec![true, false] }
}

/// A machine of 3 MiB below and 1 MiB above the hole, with three sections.
fn area() -> StateArea {
    let regions = [(GuestAddress(0), 3 * MIB), (GuestAddress(4 << 30), MIB)];
    let sections = vec![
        Section::encode("vcpu", 0, 1, &registers()).unwrap(),
        Section::encode("vcpu", 1, 1, &registers()).unwrap(),
        Section::encode("clock", 0, 3, &12_345_u64).unwrap(),
    ];
    StateArea::new(&regions, sections).unwrap()
}

/// Reads an area whose stored part is `bytes` and whose rest is zeroes.
fn read(bytes: &[u8], area_len: u64) -> Result<StateArea, FormatError> {
    StateArea::read(area_len, |StateOffset(offset), buffer| {
        assert!(offset + buffer.len() as u64 <= area_len, "read past the end");
        buffer.fill(0);
        let stored = bytes.get(usize::try_from(offset).unwrap()..).unwrap_or(&[]);
        let len = stored.len().min(buffer.len());
        buffer[..len].copy_from_slice(&stored[..len]);
        Ok(())
    })
}

/// Writes the checksum that the document asks for.
fn seal(bytes: &mut [u8]) {
    let len = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let len = len.clamp(FIXED_LEN, bytes.len());
    bytes[60..64].fill(0);
    let crc = crc32fast::hash(&bytes[..len]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
}

/// The error after `change` was made to a sound header and the checksum renewed.
fn error_after(change: impl FnOnce(&mut [u8])) -> String {
    let area = area();
    let mut bytes = area.encode();
    change(&mut bytes);
    seal(&mut bytes);
    let result = read(&bytes, area.layout.total_length());
    result.unwrap_err().to_string()
}

#[test]
fn a_section_that_claims_more_than_it_may_have_is_not_read() {
    let area = area();
    let bytes = area.encode();
    let clock = area.sections[2].bytes.len() as u64;
    let read = |most| {
        StateArea::read_section(area.layout.total_length(), "clock", most, |offset, buffer| {
            let start = usize::try_from(offset.0).unwrap();
            buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
            Ok(())
        })
    };
    assert_eq!(read(clock).unwrap(), area.sections[2]);
    let error = read(clock - 1).unwrap_err().to_string();
    let wanted = "VM-state section 'clock.0' is damaged: it has 3 bytes, at most 2 are possible";
    assert_eq!(error, wanted);
}

/// Where a field of the section table lies.
fn entry(section: usize, field: usize) -> usize {
    FIXED_LEN + 2 * REGION_LEN + section * ENTRY_LEN + field
}

#[test]
fn round_trip_gives_the_same_sections_and_layout() {
    let area = area();
    let read = read(&area.encode(), area.layout.total_length()).unwrap();
    assert_eq!(read, area);
    let mut reader = SectionReader::new(&read.sections);
    for cpu in 0..2 {
        assert_eq!(reader.take::<Registers>("vcpu", cpu, 1..=1).unwrap(), registers());
    }
    assert_eq!(reader.take::<u64>("clock", 0, 2..=3).unwrap(), 12_345);
    reader.finish().unwrap();
}

#[test]
fn golden_version_1_decodes_and_encodes_to_the_same_bytes() {
    let golden = include_bytes!("../../tests/golden/vm-state-v1.bin");
    let read = read(golden, area().layout.total_length()).unwrap();
    assert_eq!(read, area());
    assert_eq!(read.encode(), golden);
}

#[test]
fn regions_are_packed_by_address_at_2_mib_and_found_by_address() {
    let area = area();
    let layout = &area.layout;
    assert_eq!(layout.start(), StateOffset(4 * MIB));
    assert_eq!(layout.total_length(), 10 * MIB);
    assert_eq!(layout.ram_bytes(), 4 * MIB);
    let offset = |address| layout.offset_of(GuestAddress(address)).map(|offset| offset.0);
    assert_eq!(offset(0x1234), Some(4 * MIB + 0x1234));
    assert_eq!(offset(3 * MIB - 1), Some(7 * MIB - 1));
    assert_eq!(offset(3 * MIB), None);
    assert_eq!(offset(4 << 30), Some(8 * MIB));
    assert_eq!(offset((4 << 30) + MIB), None);
}

#[test]
fn ram_starts_at_the_next_4_mib_after_large_sections() {
    let start = |len: usize| {
        let section = Section { name: SectionName::new("big", 0), version: 1, bytes: vec![0; len] };
        let area = StateArea::new(&[(GuestAddress(0), MIB)], vec![section]).unwrap();
        area.layout.start().0
    };
    assert_eq!(start(1), 4 * MIB);
    assert_eq!(start(3 << 20), 4 * MIB);
    assert_eq!(start(4 << 20), 8 * MIB);
}

#[test]
fn impossible_ram_layouts_are_refused() {
    let layout = |start, regions: &[(u64, u64)]| {
        let regions = regions.iter().map(|&(at, len)| (GuestAddress(at), len));
        RamLayout::new(StateOffset(start), regions).unwrap_err()
    };
    assert_eq!(layout(MIB, &[]), LayoutError::Unaligned(MIB));
    assert_eq!(layout(0, &[(0, 0)]), LayoutError::NotPages { start: 0, len: 0 });
    assert_eq!(layout(0, &[(1, 4096)]), LayoutError::NotPages { start: 1, len: 4096 });
    assert_eq!(layout(0, &[(0, 8192), (4096, 4096)]), LayoutError::Order(4096));
    let top = u64::MAX - 4095;
    assert_eq!(layout(0, &[(top, 4096)]), LayoutError::Overflow(top));
    assert_eq!(layout(0, &[(0, top)]), LayoutError::TooLarge);
    let offset = u64::MAX - (2 * MIB - 1);
    assert_eq!(layout(offset, &[(0, 4096)]), LayoutError::Overflow(0));
    let many: Vec<_> = (0..65).map(|n| (n * 4096, 4096)).collect();
    assert_eq!(layout(0, &many), LayoutError::TooMany(65));
}

#[test]
fn every_flipped_bit_is_found_and_a_payload_is_named() {
    let area = area();
    let bytes = area.encode();
    let header_len = Header::length(2, 3);
    let payload = |n: usize| {
        let at = entry(n, 56);
        let start = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let start = usize::try_from(start).unwrap();
        start..start + area.sections[n].bytes.len()
    };
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        let result = read(&damaged, area.layout.total_length());
        match (0..3).find(|&n| payload(n).contains(&at)) {
            Some(n) => {
                let name = &area.sections[n].name;
                assert_eq!(
                    result.unwrap_err().to_string(),
                    format!("VM-state section '{name}' is damaged: its checksum is wrong")
                );
            }
            None if at < header_len => assert!(result.is_err(), "byte {at} of the header"),
            None => assert_eq!(result.unwrap(), area, "byte {at} is between payloads"),
        }
    }
}

#[test]
fn truncated_areas_say_so() {
    let area = area();
    let bytes = area.encode();
    for len in [0, 63, 64, 200, 4096, 4 * MIB, area.layout.total_length() - 1] {
        let cut = &bytes[..bytes.len().min(usize::try_from(len).unwrap())];
        let text = read(cut, len).unwrap_err().to_string();
        assert!(text.starts_with("the VM state is truncated"), "{len}: {text}");
    }
}

#[test]
fn a_longer_area_than_the_header_tells_is_refused() {
    let text = read(&area().encode(), 12 * MIB).unwrap_err().to_string();
    assert!(text.contains("tells of 10485760 bytes, the snapshot has 12582912"), "{text}");
}

#[test]
fn foreign_and_newer_formats_are_told_apart() {
    assert_eq!(
        error_after(|b| b[..8].copy_from_slice(b"QEVM\0\0\0\x03")),
        "the VM state was made by QEMU; only QEMU can load it"
    );
    assert!(error_after(|b| b[..8].fill(0x41)).contains("unknown format"));
    assert_eq!(
        error_after(|b| b[8] = 2),
        "the VM state has format version 2; this program reads versions 1 to 1"
    );
    assert!(error_after(|b| b[8] = 0).contains("format version 0"));
}

#[test]
fn tables_that_break_a_rule_are_refused_under_a_right_checksum() {
    let put = |at: usize, value: u64| {
        move |b: &mut [u8]| b[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    let cases: [(&str, String); 11] = [
        ("RAM regions and", error_after(|b| b[32..36].fill(0xff))),
        ("at most 64 and 1024", error_after(|b| b[36..40].fill(0xff))),
        ("its length is", error_after(|b| b[12] ^= 8)),
        ("reserved bytes", error_after(|b| b[47] = 1)),
        ("not aligned", error_after(put(24, 4 * MIB + 512))),
        ("RAM offsets do not follow", error_after(put(FIXED_LEN + 16, 6 * MIB))),
        ("is not made of whole pages", error_after(put(FIXED_LEN + 8, 5))),
        ("out of order", error_after(put(FIXED_LEN + REGION_LEN, 4096))),
        ("'vcpu.1' is damaged: it overlaps", error_after(put(entry(1, 56), 64))),
        ("'clock.0' is damaged: it reaches into", error_after(put(entry(2, 56), u64::MAX - 4))),
        ("'vcpu.0' is damaged: it is larger", error_after(put(entry(0, 64), u64::MAX))),
    ];
    for (wanted, text) in cases {
        assert!(text.contains(wanted), "wanted {wanted:?}, got {text:?}");
    }
}

#[test]
fn duplicate_and_misnamed_sections_are_refused_at_both_ends() {
    assert_eq!(error_after(|b| b[entry(1, 48)] = 0), "VM-state section 'vcpu.0' is there twice");
    let text = error_after(|b| b[entry(0, 0)] = b'\n');
    assert!(text.contains(r"\ncpu.0"), "{text}");
    let text = error_after(|b| b[entry(0, 40)] = b'x');
    assert!(text.contains("the section table has the entry"), "{text}");

    let clock = Section::encode("clock", 0, 1, &1).unwrap();
    let twice = StateArea::new(&[], vec![clock.clone(), clock]).unwrap_err();
    assert_eq!(twice.to_string(), "VM-state section 'clock.0' is there twice");
    for kind in ["", "Clock", "a b", &"x".repeat(49)] {
        assert!(Section::encode(kind, 0, 1, &1).is_err(), "{kind:?}");
    }
}

#[test]
fn missing_unknown_and_newer_sections_are_named() {
    let sections = area().sections;
    let mut reader = SectionReader::new(&sections);
    let text = |error: FormatError| error.to_string();
    assert_eq!(
        text(reader.take::<u64>("pit", 0, 1..=1).unwrap_err()),
        "VM-state section 'pit.0' is missing"
    );
    assert_eq!(
        text(reader.take::<u64>("clock", 0, 1..=2).unwrap_err()),
        "VM-state section 'clock.0' has version 3; this program reads versions 1 to 2"
    );
    reader.take_raw("vcpu", 0).unwrap();
    assert_eq!(
        text(reader.finish().unwrap_err()),
        "VM-state section 'vcpu.1' is unknown to this machine"
    );
}

#[test]
fn payloads_that_claim_more_than_they_have_cost_nothing_and_are_refused() {
    let decode = |bytes: &[u8]| {
        let section =
            Section { name: SectionName::new("clock", 0), version: 1, bytes: bytes.to_vec() };
        section.decode::<serde_bytes::ByteBuf>(1..=1).unwrap_err();
        section.decode::<Vec<u64>>(1..=1).unwrap_err().to_string()
    };
    // An array, a byte string and a text of 2^60 items; an array in an array, 100 000 deep.
    for head in [0x9b, 0x5b, 0x7b] {
        let text = decode(&[head, 0x10, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(text.starts_with("VM-state section 'clock.0' cannot be decoded"));
    }
    decode(&[0x81; 100_000]);
    let text = decode(&[0x80, 0x00]);
    assert!(text.ends_with("1 bytes are left over"), "{text}");
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
        magic: bool,
        len in prop_oneof![0..20 * MIB, any::<u64>()],
    ) {
        let mut bytes = bytes;
        if magic && bytes.len() >= FIXED_LEN {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            seal(&mut bytes);
        }
        // Only a right checksum gets past the header, and then the tables are random.
        prop_assert!(read(&bytes, len).is_err() || magic);
    }

    #[test]
    fn sealed_changes_give_an_error_or_a_sound_layout(
        changes in proptest::collection::vec((8..400_usize, any::<u8>()), 1..6),
    ) {
        let area = area();
        let mut bytes = area.encode();
        for (at, value) in changes {
            let at = at % Header::length(2, 3);
            bytes[at] = value;
        }
        seal(&mut bytes);
        if let Ok(read) = read(&bytes, area.layout.total_length()) {
            prop_assert_eq!(read.layout.total_length(), area.layout.total_length());
            prop_assert_eq!(read.sections.len(), 3);
        }
    }

    #[test]
    fn any_payload_is_decoded_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let section = Section { name: SectionName::new("vcpu", 0), version: 1, bytes };
        if let Ok(value) = section.decode::<Registers>(1..=1) {
            prop_assert!(value.flags.len() <= section.bytes.len());
        }
    }
}
