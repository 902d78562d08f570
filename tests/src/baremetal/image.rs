//! The guest as an ELF file: the code of `guest.s`, with the tables a processor wants.
//!
//! It can be entered in the 64-bit state that `docs/boot.md` describes, and through a PVH note in
//! 32-bit protected mode, which is what QEMU asks of an ELF kernel.

#![allow(
    clippy::cast_possible_truncation,
    reason = "addresses are below 2 MiB, and x86-64 hosts only"
)]

use std::path::Path;
use std::slice;

use super::layout::{
    ANSWER, CODE_MAX, COUNTERS, DUMP, DUMP_VECTOR, FREE, GDT, IDT, IMAGE, IMAGE_END, MAILBOXES,
    MAPPED_GIB, OTHER_PML4, PML4, REQUEST, SET, STACKS, TASK_SIZE, TASKS, VECTORS,
};

/// Task descriptors in the GDT.
const VCPUS: u64 = 4;
const GDT_ENTRIES: usize = 6 + 2 * VCPUS as usize;
const GDT_LIMIT: usize = GDT_ENTRIES * 8 - 1;
const IDT_LIMIT: usize = 16 * VECTORS as usize - 1;

std::arch::global_asm!(
    include_str!("guest.s"),
    BASE = const IMAGE,
    PML4 = const PML4,
    STACKS = const STACKS,
    REQUEST = const REQUEST,
    ANSWER = const ANSWER,
    MAILBOXES = const MAILBOXES,
    TASKS = const TASKS,
    SET = const SET,
    DUMP = const DUMP,
    DUMP_VECTOR = const DUMP_VECTOR,
    COUNTERS = const COUNTERS,
    GDT = const GDT,
    GDT_LIMIT = const GDT_LIMIT,
    IDT = const IDT,
    IDT_LIMIT = const IDT_LIMIT,
);

unsafe extern "C" {
    #[link_name = "tardigrade_guest_start"]
    static START: u8;
    #[link_name = "tardigrade_guest_end"]
    static END: u8;
}

/// Bits of page table entries: present, writable, for CPL 3 too; a 2 MiB page.
const TABLE: u64 = 0x7;
const PAGE_2M: u64 = 0x87;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: where PVH enters.
const PVH_ENTRY_NOTE: u32 = 18;

fn code() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    let length = end.addr() - start.addr();
    // SAFETY: both symbols are of `guest.s`, in one section, with only its bytes between them.
    let code = unsafe { slice::from_raw_parts(start, length) };
    assert!(code.len() as u64 <= CODE_MAX);
    code
}

/// Word `index` of the header of `guest.s`.
fn header(index: usize) -> u64 {
    let word = code().as_chunks::<4>().0[index];
    u64::from(u32::from_le_bytes(word))
}

/// What a vCPU that is started runs first, in real mode.
pub fn trampoline() -> &'static [u8] {
    let (start, length) = (header(3) as usize, header(4) as usize);
    &code()[start..start + length]
}

/// How many routines the guest has.
pub fn routines() -> u64 {
    header(5)
}

/// Writes the guest to a file.
pub fn write(path: &Path) {
    std::fs::write(path, elf()).unwrap();
}

/// The guest as an ELF file.
pub fn elf() -> Vec<u8> {
    const NOTE: u64 = 64 + 2 * 56;
    const NOTE_SIZE: u64 = 24;
    const DATA: u64 = 0x1000;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    words16(&mut file, &[2, 62]); // executable, x86-64
    words32(&mut file, &[1]);
    words64(&mut file, &[IMAGE + header(0), 64, 0]); // entry, program headers
    words32(&mut file, &[0]);
    words16(&mut file, &[64, 56, 2, 0, 0, 0]);
    words32(&mut file, &[1, 7]); // PT_LOAD
    words64(&mut file, &[DATA, IMAGE, IMAGE, IMAGE_END - IMAGE, FREE - IMAGE, 0x1000]);
    words32(&mut file, &[4, 4]); // PT_NOTE
    words64(&mut file, &[NOTE, 0, 0, NOTE_SIZE, NOTE_SIZE, 4]);
    words32(&mut file, &[4, 8, PVH_ENTRY_NOTE]);
    file.extend(b"Xen\0");
    words64(&mut file, &[IMAGE + header(1)]);
    file.resize(DATA as usize, 0);
    file.extend(image());
    file
}

fn image() -> Vec<u8> {
    let mut image = code().to_vec();
    let mut place = |address: u64, words: Vec<u64>| {
        image.resize((address - IMAGE) as usize, 0);
        words64(&mut image, &words);
    };
    place(GDT, gdt());
    place(IDT, (0..VECTORS).flat_map(gate).collect());
    place(PML4, page_tables());
    place(OTHER_PML4, vec![(PML4 + 0x1000) | TABLE]);
    image.resize((IMAGE_END - IMAGE) as usize, 0);
    image
}

/// Selectors 0x08 code, 0x10 data, 0x18 32-bit code; 0x23 and 0x2b data and code of CPL 3; from
/// 0x30 a task for each vCPU.
fn gdt() -> Vec<u64> {
    let mut table = vec![
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for vcpu in 0..VCPUS {
        let base = TASKS + vcpu * TASK_SIZE;
        // Available 64-bit TSS, limit 0x67; the base is below 16 MiB.
        table.extend([0x0000_8900_0000_0067 | base << 16, 0]);
    }
    assert_eq!(table.len(), GDT_ENTRIES);
    table
}

/// An interrupt gate to the vector's stub.
fn gate(vector: u64) -> [u64; 2] {
    let stub = IMAGE + header(2) + 16 * vector;
    [(stub & 0xffff) | 0x08 << 16 | 0x8e00 << 32 | (stub >> 16) << 48, 0]
}

/// The first GiB to themselves in 2 MiB pages, open to CPL 3.
fn page_tables() -> Vec<u64> {
    let mut words = vec![0; 1024];
    words[0] = (PML4 + 0x1000) | TABLE;
    for gib in 0..MAPPED_GIB {
        words[512 + gib as usize] = (PML4 + 0x2000 + gib * 0x1000) | TABLE;
    }
    words.extend((0..MAPPED_GIB * 512).map(|page| page << 21 | PAGE_2M));
    words
}

fn words16(bytes: &mut Vec<u8>, words: &[u16]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn words32(bytes: &mut Vec<u8>, words: &[u32]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn words64(bytes: &mut Vec<u8>, words: &[u64]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}
