//! Zero pages, touched pages and clearing, on real mappings.

use std::fs::File;

use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion};

use super::*;

fn anonymous(len: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), len)]).unwrap()
}

fn shared_file(len: usize) -> (GuestMemory, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len as u64).unwrap();
    let offset = Some(FileOffset::new(file.try_clone().unwrap(), 0));
    let memory = GuestMemory::from_ranges_with_files([(GuestAddress(0), len, offset)]).unwrap();
    (memory, file)
}

#[test]
fn one_bit_anywhere_makes_a_page_nonzero() {
    let memory = anonymous(4096);
    let ram = slices(&memory);
    // SAFETY: the page is mapped and page aligned.
    let is_zero = || unsafe { page_is_zero(ram[0].host(0, PAGE)) };
    assert!(is_zero());
    for at in [0, 7, 8, 63, 64, 2048, 4088, 4095] {
        memory.write_obj(0x10_u8, GuestAddress(at)).unwrap();
        assert!(!is_zero(), "byte {at}");
        memory.write_obj(0_u8, GuestAddress(at)).unwrap();
    }
    assert!(is_zero());
}

#[test]
fn pagemap_tells_touched_pages_and_looking_touches_none() {
    let memory = anonymous(1 << 20);
    let ram = slices(&memory);
    memory.write_obj(1_u8, GuestAddress(5 * PAGE)).unwrap();
    memory.write_obj(1_u8, GuestAddress(200 * PAGE)).unwrap();
    let pagemap = Pagemap::open().unwrap();
    for _ in 0..2 {
        let touched = pagemap.touched(ram[0].host(0, 1 << 20), 256).unwrap();
        let which: Vec<_> = (0..256).filter(|&at| touched[at]).collect();
        assert_eq!(which, [5, 200]);
    }
}

#[test]
fn only_anonymous_private_memory_is_trusted_to_be_zero_when_untouched() {
    assert!(slices(&anonymous(4096))[0].is_anonymous());
    let (memory, _file) = shared_file(4096);
    assert!(!slices(&memory)[0].is_anonymous());
}

#[test]
fn memory_is_not_trusted_while_pieces_of_files_are_mapped_over_it() {
    let memory = anonymous(4096);
    let record = MmapRegion::bitmap(memory.iter().next().unwrap());
    for pieces in [true, false] {
        record.set_pieces(pieces);
        assert_eq!(slices(&memory)[0].is_anonymous(), !pieces);
    }
}

#[test]
fn memory_in_huge_pages_is_cleared_by_writing() {
    let memory = anonymous(4096);
    let region = memory.iter().next().unwrap();
    let flags = region.flags() | libc::MAP_HUGETLB;
    // SAFETY: the range is that of `memory`, which outlives the second view of it.
    let huge = unsafe { MmapRegion::build_raw(region.as_ptr(), 4096, region.prot(), flags) };
    let huge = GuestRegion::new(huge.unwrap(), GuestAddress(0)).unwrap();
    let ram = RamSlice { region: &huge };
    assert!(!ram.is_anonymous());
    memory.write_slice(&[0xa5; 4096], GuestAddress(0)).unwrap();
    ram.clear(0, 4096);
    let mut bytes = [0xff; 4096];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn clear_zeroes_whole_pages_parts_of_pages_and_shared_files() {
    let (shared, _file) = shared_file(4 * 4096);
    for memory in [anonymous(4 * 4096), shared] {
        let ram = slices(&memory);
        for (offset, len) in [(4096, 8192), (512, 1024), (0, 4 * 4096)] {
            memory.write_slice(&[0xa5; 4 * 4096], GuestAddress(0)).unwrap();
            ram[0].clear(offset, len);
            let mut bytes = [0; 4 * 4096];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            for (at, byte) in bytes.iter().enumerate() {
                let inside = (offset..offset + len).contains(&(at as u64));
                assert_eq!(*byte == 0, inside, "byte {at} of {offset}+{len}");
            }
        }
    }
}
