use super::*;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The entries of a table by type, in order, after a check of its header.
fn parse(table: &[u8]) -> Vec<(u8, Vec<u8>)> {
    assert_eq!(&table[..4], b"PCMP");
    assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
    assert_eq!(table[6], 4, "revision 1.4");
    assert_eq!(sum(table), 0, "checksum");
    assert_eq!(u32::from_le_bytes(table[36..40].try_into().unwrap()), LAPIC_ADDR);
    let mut rest = &table[HEADER_LENGTH..];
    let mut entries = Vec::new();
    while let Some(&kind) = rest.first() {
        let (entry, after) = rest.split_at(if kind == 0 { 20 } else { 8 });
        entries.push((kind, entry.to_vec()));
        rest = after;
    }
    assert_eq!(entries.len(), usize::from(u16::from_le_bytes([table[34], table[35]])));
    assert!(entries.is_sorted_by_key(|(kind, _)| *kind), "sorted by type");
    entries
}

fn of_type(entries: &[(u8, Vec<u8>)], wanted: u8) -> Vec<&[u8]> {
    entries.iter().filter(|(kind, _)| *kind == wanted).map(|(_, entry)| &entry[..]).collect()
}

#[test]
fn floating_pointer_leads_to_the_table() {
    let pointer = floating_pointer();
    assert_eq!(&pointer[..4], b"_MP_");
    assert_eq!(u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap())), MP_TABLE_ADDR.0);
    assert_eq!(pointer[8], 1, "16 bytes");
    assert_eq!(sum(&pointer), 0);
    assert_eq!(pointer[11], 0, "a configuration table is present");
}

#[test]
fn every_vcpu_is_listed_and_the_first_one_boots() {
    for vcpus in [1, 2, 4, 31, MAX_VCPUS] {
        let table = configuration_table(vcpus);
        let entries = parse(&table);
        let processors = of_type(&entries, 0);
        assert_eq!(processors.len(), usize::from(vcpus));
        for (id, processor) in processors.iter().enumerate() {
            assert_eq!(usize::from(processor[1]), id);
            assert_eq!(processor[3], if id == 0 { 3 } else { 1 });
        }
        let io_apics = of_type(&entries, 2);
        assert_eq!(io_apics.len(), 1);
        assert_eq!(io_apics[0][1], vcpus, "an id that no local APIC has");
        assert_eq!(io_apics[0][3], 1, "enabled");
        assert_eq!(u32::from_le_bytes(io_apics[0][4..].try_into().unwrap()), IOAPIC_ADDR);
    }
}

#[test]
fn the_largest_table_fits_the_bios_area() {
    let table = configuration_table(MAX_VCPUS);
    assert!(MP_TABLE_ADDR.0 + table.len() as u64 <= super::super::layout::HIGH_MEMORY_ADDR.0);
}

#[test]
fn every_isa_interrupt_is_on_the_pin_of_its_number() {
    let entries = parse(&configuration_table(3));
    let buses = of_type(&entries, 1);
    assert_eq!(buses, [b"\x01\x00ISA   "]);
    let interrupts = of_type(&entries, 3);
    assert_eq!(interrupts.len(), 24);
    for (number, interrupt) in (0u8..).zip(interrupts) {
        // Vectored, flags as the bus has it, bus 0, its interrupt, I/O APIC 3, pin.
        assert_eq!(interrupt, [3, 0, 0, 0, 0, number, 3, number]);
    }
    let local = of_type(&entries, 4);
    assert_eq!(local, [[4, 3, 0, 0, 0, 0, 0xff, 0], [4, 1, 0, 0, 0, 0, 0xff, 1]]);
}
