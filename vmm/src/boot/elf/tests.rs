use std::io::Cursor;

use super::super::testing::{ENTRY, elf, elf_of, headers};
use super::*;

fn parse(file: &[u8]) -> Result<ElfImage, ElfError> {
    ElfImage::parse(&mut Cursor::new(file), file.len() as u64)
}

/// The message for a kernel whose headers `spoil` changed.
fn refusal(spoil: impl FnOnce(&mut Elf64_Ehdr, &mut Elf64_Phdr)) -> String {
    let (mut header, mut segment) = headers(64);
    spoil(&mut header, &mut segment);
    let result =
        parse(&elf_of(header, &[segment], &[0x90; 64])).and_then(|image| image.check_placement());
    result.unwrap_err().to_string()
}

#[test]
fn good_kernel_gives_its_entry_and_its_end_with_bss() {
    let image = parse(&elf(&[0x90; 64])).unwrap();
    image.check_placement().unwrap();
    assert_eq!(image.entry(), ENTRY);
    assert_eq!(image.end(), ENTRY + 64 + super::super::testing::BSS);
}

#[test]
fn other_machines_and_file_types_are_refused() {
    assert_eq!(refusal(|h, _| h.e_ident[4] = 1), "not a 64-bit little-endian ELF file");
    assert_eq!(refusal(|h, _| h.e_ident[5] = 2), "not a 64-bit little-endian ELF file");
    assert_eq!(
        refusal(|h, _| h.e_machine = 183),
        "an ELF file for machine 183, not for x86-64 (62)"
    );
    assert_eq!(refusal(|h, _| h.e_type = 1), "an ELF file of type 1, not an executable (2 or 3)");
}

#[test]
fn absurd_program_header_tables_are_refused() {
    assert!(refusal(|h, _| h.e_phnum = 65).contains("65 program headers"));
    assert!(refusal(|h, _| h.e_phentsize = 32).contains("of 32 bytes"));
    assert!(refusal(|h, _| h.e_phoff = 8).contains("at 0x8"));
    assert_eq!(refusal(|h, _| h.e_phnum = 0), "no segment to load");
    assert!(refusal(|h, _| h.e_phoff = u64::MAX - 8).contains("program header table ends"));
    assert!(refusal(|h, _| h.e_phoff = 0x1_0000).contains("program header table ends"));
}

#[test]
fn segments_that_are_not_in_the_file_are_refused() {
    let text = refusal(|_, s| s.p_filesz = 65);
    assert_eq!(text, "truncated: a segment ends at byte 4161, but there are 4160 bytes");
    assert!(refusal(|_, s| s.p_offset = u64::MAX).contains("past the address space"));
    assert!(refusal(|_, s| s.p_memsz = 63).contains("64 bytes in the file for 63 bytes"));
}

#[test]
fn segments_outside_ram_are_refused() {
    assert!(refusal(|_, s| s.p_paddr = u64::MAX - 100).contains("past the address space"));
    let high = refusal(|h, s| {
        s.p_paddr = 0xbfff_f000;
        h.e_entry = s.p_paddr;
    });
    assert_eq!(
        high,
        "segment 0 at 0xbffff000-0xc0000040 is not below the end of low RAM at 0xc0000000"
    );
}

#[test]
fn segments_on_boot_structures_are_refused() {
    let at = |address: u64| {
        refusal(|h, s| {
            s.p_paddr = address;
            h.e_entry = address;
        })
    };
    let text = at(0x7000);
    assert_eq!(text, "segment 0 at 0x7000-0x8040 overlaps the boot structures at 0x0-0x30000");
    assert!(at(0x9_f000).contains("BIOS area with the MP table at 0x9fc00-0x100000"));
    assert!(at(0xf_ffff).contains("BIOS area"));
}

#[test]
fn segments_between_the_reserved_areas_are_fine() {
    let (mut header, mut segment) = headers(64);
    for address in [0x3_0000, 0x10_0000] {
        segment.p_paddr = address;
        header.e_entry = address + 63;
        let image = parse(&elf_of(header, &[segment], &[0x90; 64])).unwrap();
        image.check_placement().unwrap();
    }
}

#[test]
fn entry_outside_of_what_is_loaded_from_the_file_is_refused() {
    for entry in [0, ENTRY - 1, ENTRY + 64, u64::MAX] {
        let text = refusal(|h, _| h.e_entry = entry);
        assert_eq!(text, format!("the entry point {entry:#x} is in no loaded segment"));
    }
}

#[test]
fn file_without_a_segment_to_load_is_refused() {
    assert_eq!(refusal(|_, s| s.p_type = 4), "no segment to load");
    assert_eq!(
        refusal(|_, s| {
            s.p_memsz = 0;
            s.p_filesz = 0;
        }),
        "no segment to load"
    );
}

#[test]
fn file_cut_off_anywhere_in_what_is_needed_is_truncated() {
    let file = elf(&[0x90; 64]);
    for length in 4..file.len() {
        let error = parse(&file[..length]).unwrap_err();
        assert!(matches!(error, ElfError::Truncated { .. }), "{length}: {error}");
    }
}
