use vm_memory::ByteValued;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The e820 map as the guest reads it: from the bytes of the zero page.
fn map(ram: u64) -> Vec<(u64, u64, u32)> {
    let params = zero_page(setup_header_for(None), ram, None);
    let bytes = params.as_slice();
    assert_eq!(bytes.len(), 4096);
    let table = &bytes[0x2d0..];
    table
        .chunks(20)
        .take(usize::from(bytes[0x1e8]))
        .map(|entry| {
            let number = |at| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
            let kind = u32::from_le_bytes(entry[16..].try_into().unwrap());
            (number(0), number(0) + number(8), kind)
        })
        .collect()
}

#[test]
fn small_ram_is_in_the_map_without_the_bios_area() {
    assert_eq!(
        map(64 * MIB),
        [
            (0, 0x9_fc00, E820_RAM),
            (0x9_fc00, 0x10_0000, E820_RESERVED),
            (0x10_0000, 64 * MIB, E820_RAM),
            (0xfeff_c000, 0xff00_0000, E820_RESERVED),
        ]
    );
}

#[test]
fn ram_past_the_hole_is_in_the_map_and_the_hole_is_not() {
    let map = map(7 * GIB / 2);
    assert_eq!(map[2], (MIB, 3 * GIB, E820_RAM));
    assert_eq!(map[4], (4 * GIB, 4 * GIB + GIB / 2, E820_RAM));
    assert!(map.is_sorted());
    for pair in map.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "no overlap");
    }
    for address in [layout::MMIO_START.0, u64::from(layout::IOAPIC_ADDR)] {
        assert!(map.iter().all(|(start, end, _)| !(start..end).contains(&&address)));
    }
}

#[test]
fn all_ram_but_the_bios_area_is_in_the_map() {
    for ram in [32 * MIB, 3 * GIB - 4096, 3 * GIB, 3 * GIB + 4096, 40 * GIB] {
        let listed: u64 =
            map(ram).iter().filter(|entry| entry.2 == E820_RAM).map(|(s, e, _)| e - s).sum();
        assert_eq!(listed, ram - (0x10_0000 - 0x9_fc00), "of {ram}");
    }
}

#[test]
fn elf_kernel_gets_a_header_that_linux_accepts() {
    let params = zero_page(setup_header_for(None), 64 * MIB, Some((0x3f0_0000, 0x1234)));
    let bytes = params.as_slice();
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    // Offsets of Documentation/arch/x86/boot.rst.
    assert_eq!(bytes[0x1ef], 0, "sentinel");
    assert_eq!(bytes[0x1fe..0x200], [0x55, 0xaa]);
    assert_eq!(&bytes[0x202..0x206], b"HdrS");
    assert_eq!(bytes[0x210], 0xff, "type_of_loader");
    assert_eq!(bytes[0x211] & 1, 1, "loaded high");
    assert_eq!(u32_at(0x218), 0x3f0_0000, "ramdisk_image");
    assert_eq!(u32_at(0x21c), 0x1234, "ramdisk_size");
    assert_eq!(u64::from(u32_at(0x228)), layout::CMDLINE_ADDR.0, "cmd_line_ptr");
}

#[test]
fn bzimage_header_is_kept_but_for_what_a_loader_sets() {
    let own = setup_header {
        version: 0x020c,
        loadflags: 0x80,
        kernel_alignment: 0x20_0000,
        init_size: 0x123_4000,
        pref_address: 0x100_0000,
        ..setup_header_for(None)
    };
    let params = zero_page(setup_header_for(Some(own)), 64 * MIB, None);
    let header = params.hdr;
    assert_eq!({ header.version }, 0x020c);
    assert_eq!(header.loadflags, 0x81);
    assert_eq!({ header.init_size }, 0x123_4000);
    assert_eq!({ header.kernel_alignment }, 0x20_0000);
    assert_eq!(header.type_of_loader, 0xff);
    assert_eq!({ header.ramdisk_size }, 0);
}
