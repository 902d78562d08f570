//! The state in which the first vCPU enters the kernel: the 64-bit boot protocol of Linux
//! (`Documentation/arch/x86/boot.rst`), for which bare-metal guests can be written too. Its exact
//! description is in `docs/boot.md`.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use super::BootInfo;
use super::layout;

/// Selectors that the boot protocol asks for: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Right behind them.
const TSS_SELECTOR: u16 = 0x20;

/// Segment types (Intel SDM volume 3, 3.4.5.1 and 3.5): code, execute/read, accessed; data,
/// read/write, accessed; 64-bit TSS, busy.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Bit 1 is always set; interrupts are off.
const RFLAGS_RESET: u64 = 1 << 1;

/// x87 control word and MXCSR after FNINIT and reset: all exceptions masked.
const FPU_CONTROL_WORD: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// Page table entries: present and writable, for the kernel only; and a 2 MiB page.
const PAGE_TABLE: u64 = 0x3;
const PAGE_2M: u64 = 0x83;

/// Entries of a page table of any level.
const ENTRIES: u64 = 512;

const GIB: u64 = 1 << 30;

/// What `KVM_SET_REGS`, `KVM_SET_SREGS` and `KVM_SET_FPU` are to be called with.
#[derive(Debug, Clone, Copy)]
pub struct EntryState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, tables.
    pub sregs: kvm_sregs,
    /// x87 and SSE control.
    pub fpu: kvm_fpu,
}

/// The state for vCPU 0 to enter what was loaded. `sregs` is what `KVM_GET_SREGS` gave for it:
/// its APIC base and pending interrupts are kept. The other vCPUs get no state: they wait for
/// INIT and SIPI in KVM.
#[must_use]
pub fn initial_registers(info: &BootInfo, sregs: kvm_sregs) -> EntryState {
    let regs = kvm_regs {
        rip: info.entry.0,
        rsi: info.zero_page.0,
        rsp: layout::BOOT_STACK_TOP.0,
        rflags: RFLAGS_RESET,
        ..kvm_regs::default()
    };
    let data = flat_segment(DATA_SELECTOR, TYPE_DATA);
    let sregs = kvm_sregs {
        cs: kvm_segment { l: 1, db: 0, ..flat_segment(CODE_SELECTOR, TYPE_CODE) },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_segment(),
        ldt: kvm_segment { type_: 0x2, unusable: 1, ..kvm_segment::default() },
        gdt: kvm_dtable { base: layout::GDT_ADDR.0, limit: GDT_LIMIT, ..kvm_dtable::default() },
        // Without an IDT any exception shuts the vCPU down, rather than running wild.
        idt: kvm_dtable::default(),
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr2: 0,
        cr3: layout::PML4_ADDR.0,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..sregs
    };
    let fpu = kvm_fpu { fcw: FPU_CONTROL_WORD, mxcsr: MXCSR, ..kvm_fpu::default() };
    EntryState { regs, sregs, fpu }
}

/// A segment over all 4 GiB.
fn flat_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// VT-x enters a 64-bit guest only with a busy TSS in the task register.
fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: TYPE_BUSY_TSS,
        present: 1,
        ..kvm_segment::default()
    }
}

/// Two null descriptors, code, data, and the TSS, which takes two.
const GDT_LENGTH: usize = 6;
#[expect(clippy::cast_possible_truncation, reason = "47")]
const GDT_LIMIT: u16 = (GDT_LENGTH * 8 - 1) as u16;

/// The descriptor table that the segment registers are loaded from.
pub(super) fn gdt() -> Vec<u8> {
    let code = kvm_segment { l: 1, db: 0, ..flat_segment(CODE_SELECTOR, TYPE_CODE) };
    let data = flat_segment(DATA_SELECTOR, TYPE_DATA);
    let descriptors: [u64; GDT_LENGTH] =
        [0, 0, descriptor(&code), descriptor(&data), descriptor(&task_segment()), 0];
    descriptors.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// A segment as a descriptor (Intel SDM volume 3, figure 3-8). All bases are 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let limit = u64::from(limit);
    let bit = |value: u8, position: u32| u64::from(value) << position;
    (limit & 0xffff)
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | ((limit >> 16) & 0xf) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

/// How many GiB from address 0 the entry page tables map, for RAM that ends at `ram_end`.
pub(super) fn identity_mapped_gib(ram_end: u64) -> u64 {
    ram_end.div_ceil(GIB).clamp(layout::IDENTITY_MAP_MIN_GIB, layout::IDENTITY_MAP_MAX_GIB)
}

/// The page tables, for [`layout::PML4_ADDR`] onwards: they map the first `gib` GiB to themselves
/// with pages of 2 MiB, which every x86-64 processor has.
pub(super) fn page_tables(gib: u64) -> Vec<u8> {
    let directory = |index: u64| layout::PAGE_DIRECTORIES_ADDR.0 + index * layout::PAGE_SIZE;
    let pml4 = (0..ENTRIES).map(|i| if i == 0 { layout::PDPT_ADDR.0 | PAGE_TABLE } else { 0 });
    let pdpt = (0..ENTRIES).map(|i| if i < gib { directory(i) | PAGE_TABLE } else { 0 });
    let directories = (0..gib * ENTRIES).map(|i| (i << 21) | PAGE_2M);
    pml4.chain(pdpt).chain(directories).flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests;
