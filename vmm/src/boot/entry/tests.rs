use vm_memory::GuestAddress;

use super::*;

const INFO: BootInfo = BootInfo {
    entry: GuestAddress(0x123_4000),
    zero_page: layout::ZERO_PAGE_ADDR,
    kernel_end: GuestAddress(0x200_0000),
    initrd: None,
};

/// Translates as the processor does: the physical address, or `None` for a page fault.
fn walk(tables: &[u8], address: u64) -> Option<u64> {
    let entry = |table: u64, index: u64| {
        let at = usize::try_from(table - layout::PML4_ADDR.0 + index * 8).unwrap();
        let entry = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
        (entry & 1 == 1).then_some(entry)
    };
    let table = |entry: u64| entry & !0xfff;
    let pdpt = table(entry(layout::PML4_ADDR.0, address >> 39 & 511)?);
    let directory = table(entry(pdpt, address >> 30 & 511)?);
    let page = entry(directory, address >> 21 & 511)?;
    assert_eq!(page & 0x80, 0x80, "a 2 MiB page");
    Some((page & !0x1f_ffff) + (address & 0x1f_ffff))
}

#[test]
fn page_tables_map_memory_to_itself_as_far_as_told() {
    for gib in [4u64, 5, 16] {
        let tables = page_tables(gib);
        assert!(layout::PML4_ADDR.0 + tables.len() as u64 <= layout::CMDLINE_ADDR.0);
        for address in [0, 0x7000, 0x20_0000, 0xd000_0000, 0xfee0_0020, (gib << 30) - 1] {
            assert_eq!(walk(&tables, address), Some(address));
        }
        assert_eq!(walk(&tables, gib << 30), None);
    }
}

#[test]
fn identity_map_covers_devices_and_ram_within_its_bounds() {
    assert_eq!(identity_mapped_gib(32 << 20), 4);
    assert_eq!(identity_mapped_gib(4 * GIB + 1), 5);
    assert_eq!(identity_mapped_gib(7 * GIB), 7);
    assert_eq!(identity_mapped_gib(u64::MAX), 16);
}

#[test]
fn descriptors_are_the_ones_of_the_segment_registers() {
    let gdt = gdt();
    let at = |selector: u16| {
        let start = usize::from(selector);
        u64::from_le_bytes(gdt[start..start + 8].try_into().unwrap())
    };
    assert_eq!(at(0), 0);
    assert_eq!(at(CODE_SELECTOR), 0x00af_9b00_0000_ffff);
    assert_eq!(at(DATA_SELECTOR), 0x00cf_9300_0000_ffff);
    assert_eq!(at(TSS_SELECTOR), 0x0000_8b00_0000_0067);
    assert_eq!(at(TSS_SELECTOR + 8), 0, "upper half of the TSS base");
    assert_eq!(usize::from(GDT_LIMIT) + 1, gdt.len());
}

#[test]
fn first_vcpu_enters_long_mode_with_the_zero_page_in_rsi() {
    let before = kvm_sregs { apic_base: 0xfee0_0900, ..kvm_sregs::default() };
    let EntryState { regs, sregs, fpu } = initial_registers(&INFO, before);
    assert_eq!(regs.rip, 0x123_4000);
    assert_eq!(regs.rsi, layout::ZERO_PAGE_ADDR.0);
    assert_eq!(regs.rsp, layout::BOOT_STACK_TOP.0);
    assert_eq!(regs.rflags, 2, "interrupts off");
    assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001, "paging and protection on");
    assert_eq!(sregs.cr4, 0x20, "PAE");
    assert_eq!(sregs.efer, 0x500, "long mode enabled and active");
    assert_eq!(sregs.cr3, layout::PML4_ADDR.0);
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    assert_eq!((sregs.ss.selector, sregs.ds.selector, sregs.es.selector), (0x18, 0x18, 0x18));
    assert_eq!(sregs.idt.limit, 0);
    assert_eq!(sregs.apic_base, 0xfee0_0900, "kept");
    assert_eq!((fpu.fcw, fpu.mxcsr), (0x37f, 0x1f80));
}
