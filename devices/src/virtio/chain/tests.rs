use super::*;
use crate::virtio::testing::{
    Desc, INDIRECT, MEMORY, NEXT, REGION, WRITE, memory, readable, store_chain, store_desc,
    writable,
};

const TABLE: u64 = 0x1000;
const INDIRECT_TABLE: u64 = 0x8000;

fn rules() -> ChainRules {
    ChainRules { desc_table: TABLE, size: 8, max_len: 8, indirect: true }
}

fn indirect(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: INDIRECT, next: 0 }
}

fn load(mem: &GuestMemory, rules: &ChainRules, head: u16) -> Result<Chain, Malformed> {
    let mut chain = Chain::default();
    chain.load(mem, rules, head).map(|()| chain)
}

fn segments(list: &SegmentList) -> Vec<(u64, u32)> {
    list.segments().iter().map(|s| (s.addr.0, s.len)).collect()
}

#[test]
fn direct_chain_splits_into_readable_and_writable() {
    let mem = memory();
    let descs =
        [readable(0x100, 16), readable(0x200, 0), writable(REGION - 8, 16), writable(0x300, 1)];
    store_chain(&mem, TABLE, 2, &descs);
    let chain = load(&mem, &rules(), 2).unwrap();
    assert_eq!(segments(&chain.readable), [(0x100, 16)]);
    assert_eq!(segments(&chain.writable), [(REGION - 8, 16), (0x300, 1)]);
}

#[test]
fn indirect_table_of_the_longest_chain_is_taken() {
    let mem = memory();
    store_chain(&mem, INDIRECT_TABLE, 0, &[readable(0, 4); 8]);
    // The WRITE flag of an indirect descriptor means nothing (section 2.7.5.3.2).
    let mut desc = indirect(INDIRECT_TABLE, 8 * 16);
    desc.flags |= WRITE;
    store_chain(&mem, TABLE, 0, &[desc]);
    assert_eq!(load(&mem, &rules(), 0).unwrap().readable.len(), 32);
}

#[test]
fn direct_descriptors_may_lead_to_an_indirect_table() {
    let mem = memory();
    store_chain(&mem, INDIRECT_TABLE, 0, &[writable(0x20, 2)]);
    let descs = [readable(0x10, 1), indirect(INDIRECT_TABLE, 16)];
    store_chain(&mem, TABLE, 0, &descs);
    let chain = load(&mem, &rules(), 0).unwrap();
    assert_eq!(segments(&chain.readable), [(0x10, 1)]);
    assert_eq!(segments(&chain.writable), [(0x20, 2)]);
}

#[test]
fn malformed_chains_are_refused_by_name() {
    let outside = |addr, len| Malformed::Address { addr, len };
    let link = |mut desc: Desc, next| {
        desc.flags |= NEXT;
        desc.next = next;
        desc
    };
    let ok = readable(0, 1);
    let cases: Vec<(&str, Vec<Desc>, Malformed)> = vec![
        ("loop", vec![link(ok, 0)], Malformed::TooLong(8)),
        ("next outside", vec![link(ok, 8)], Malformed::DescriptorIndex(8)),
        ("past memory", vec![readable(MEMORY - 1, 2)], outside(MEMORY - 1, 2)),
        ("far away", vec![writable(1 << 40, 1)], outside(1 << 40, 1)),
        ("wraps around", vec![readable(u64::MAX - 1, 4)], outside(u64::MAX - 1, 4)),
        ("ends at the end", vec![readable(u64::MAX, 1)], outside(u64::MAX, 1)),
        ("order", vec![link(writable(0, 1), 1), ok], Malformed::Order),
        ("indirect goes on", vec![link(indirect(INDIRECT_TABLE, 16), 1), ok], Malformed::Indirect),
        ("indirect empty", vec![indirect(INDIRECT_TABLE, 0)], Malformed::Indirect),
        ("indirect odd", vec![indirect(INDIRECT_TABLE, 17)], Malformed::Indirect),
        ("indirect outside", vec![indirect(MEMORY, 16)], outside(MEMORY, 16)),
        ("indirect wraps", vec![indirect(u64::MAX - 7, 16)], outside(u64::MAX - 7, 16)),
        // INDIRECT_TABLE + 0x100 holds a table that leads to itself.
        ("nested", vec![indirect(INDIRECT_TABLE + 0x100, 16)], Malformed::Indirect),
    ];
    for (name, descs, want) in cases {
        let mem = memory();
        store_desc(&mem, INDIRECT_TABLE + 0x100, 0, indirect(INDIRECT_TABLE + 0x100, 16));
        for (i, desc) in descs.iter().enumerate() {
            store_desc(&mem, TABLE, i as u16, *desc);
        }
        assert_eq!(load(&mem, &rules(), 0).unwrap_err(), want, "{name}");
    }
}

#[test]
fn head_outside_the_table_is_refused() {
    assert_eq!(load(&memory(), &rules(), 8).unwrap_err(), Malformed::DescriptorIndex(8));
}

#[test]
fn indirect_table_longer_than_a_chain_may_be_is_refused() {
    let mem = memory();
    store_chain(&mem, INDIRECT_TABLE, 0, &[readable(0, 4); 9]);
    store_chain(&mem, TABLE, 0, &[indirect(INDIRECT_TABLE, 9 * 16)]);
    assert_eq!(load(&mem, &rules(), 0).unwrap_err(), Malformed::TooLong(8));
}

#[test]
fn indirect_that_was_not_negotiated_is_refused() {
    let mem = memory();
    store_chain(&mem, INDIRECT_TABLE, 0, &[readable(0, 4)]);
    store_chain(&mem, TABLE, 0, &[indirect(INDIRECT_TABLE, 16)]);
    let rules = ChainRules { indirect: false, ..rules() };
    assert_eq!(load(&mem, &rules, 0).unwrap_err(), Malformed::Indirect);
}

#[test]
fn more_than_4_gib_is_refused() {
    // One region of 3 GiB that is never touched takes no memory.
    let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 3 << 30)]).unwrap();
    let descs = [readable(0x1_0000, 2 << 30), readable(0x1_0000, 2 << 30)];
    store_chain(&mem, TABLE, 0, &descs);
    assert_eq!(load(&mem, &rules(), 0).unwrap_err(), Malformed::TooLarge);
}

#[test]
fn read_front_crosses_segments_and_keeps_the_rest() {
    let mem = memory();
    mem.write_slice(&[1, 2, 3, 4, 5, 6], GuestAddress(0x100)).unwrap();
    let mut list = SegmentList::default();
    for (addr, len) in [(0x100, 2), (0x102, 1), (0x103, 3)] {
        list.push(Segment { addr: GuestAddress(addr), len });
    }
    let mut buf = [0; 4];
    assert!(list.read_front(&mem, &mut buf).unwrap());
    assert_eq!(buf, [1, 2, 3, 4]);
    assert_eq!(segments(&list), [(0x104, 2)]);
    assert_eq!(list.pop_last_byte(), Some(GuestAddress(0x105)));
    assert!(!list.read_front(&mem, &mut buf).unwrap(), "only one byte is left");
    assert_eq!(list.pop_last_byte(), None);
}
