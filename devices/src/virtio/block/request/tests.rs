use vm_memory::Bytes;

use super::*;
use crate::virtio::chain::ChainRules;
use crate::virtio::testing::{Desc, memory, readable, store_chain, writable};

const TABLE: u64 = 0x1000;
const HEADER: u64 = 0x2000;

fn parse(kind: u32, sector: u64, descs: &[Desc]) -> Result<(Request, Chain), Malformed> {
    let mem = memory();
    mem.write_obj(kind, GuestAddress(HEADER)).unwrap();
    mem.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    store_chain(&mem, TABLE, 0, descs);
    let rules = ChainRules { desc_table: TABLE, size: 16, max_len: 16, indirect: false };
    let mut chain = Chain::default();
    chain.load(&mem, &rules, 0)?;
    Request::parse(&mem, &mut chain).map(|request| (request, chain))
}

#[test]
fn types_become_operations() {
    let descs = [readable(HEADER, 16), writable(0x3000, 1)];
    for (kind, want) in [
        (0, Operation::Read(7)),
        (1, Operation::Write(7)),
        (4, Operation::Flush),
        (8, Operation::GetId),
        (11, Operation::Discard),
        (13, Operation::WriteZeroes),
        (14, Operation::Unknown(14)),
        (u32::MAX, Operation::Unknown(u32::MAX)),
    ] {
        let (request, chain) = parse(kind, 7, &descs).unwrap();
        assert_eq!(request.operation, want);
        assert_eq!(request.status, GuestAddress(0x3000));
        assert!(chain.readable.is_empty() && chain.writable.is_empty());
    }
}

#[test]
fn header_and_status_may_be_cut_anywhere() {
    // Header in three, data joined to the end of it and to the status.
    let descs = [
        readable(HEADER, 3),
        readable(HEADER + 3, 12),
        readable(HEADER + 15, 1 + 512),
        writable(0x3000, 513),
    ];
    let (request, chain) = parse(1, u64::MAX, &descs).unwrap();
    assert_eq!(request.operation, Operation::Write(u64::MAX));
    assert_eq!(request.status, GuestAddress(0x3000 + 512));
    assert_eq!((chain.readable.len(), chain.writable.len()), (512, 512));
}

#[test]
fn chains_that_cannot_be_answered_are_malformed() {
    let cases: [(&str, &[Desc], Malformed); 5] = [
        (
            "short header",
            &[readable(HEADER, 15), writable(0x3000, 1)],
            Malformed::Short("request header"),
        ),
        ("no header", &[writable(0x3000, 17)], Malformed::Short("request header")),
        (
            "empty header",
            &[readable(HEADER, 0), writable(0x3000, 1)],
            Malformed::Short("request header"),
        ),
        ("no status", &[readable(HEADER, 16)], Malformed::Short("status byte")),
        (
            "empty status",
            &[readable(HEADER, 16), writable(0x3000, 0)],
            Malformed::Short("status byte"),
        ),
    ];
    for (name, descs, want) in cases {
        assert_eq!(parse(0, 0, descs).unwrap_err(), want, "{name}");
    }
}

#[test]
fn extents_lie_inside_the_disk_or_are_none() {
    let at = |offset, len| Some(Extent { offset, len });
    for (sector, len, want) in [
        (0, 512, at(0, 512)),
        (99, 512, at(99 * 512, 512)),
        (100, 0, at(100 * 512, 0)),
        (100, 512, None),
        (99, 1024, None),
        (0, 511, None),
        (0, 513, None),
        (u64::MAX, 512, None),
        (u64::MAX, 0, None),
        (1 << 55, 512, None),
    ] {
        assert_eq!(Extent::new(sector, len, 100), want, "{sector} {len}");
    }
}

#[test]
fn ranges_are_decoded_and_bounded() {
    let mut bytes = [0; RANGE_SIZE];
    bytes[..8].copy_from_slice(&5u64.to_le_bytes());
    bytes[8..12].copy_from_slice(&3u32.to_le_bytes());
    bytes[12..].copy_from_slice(&1u32.to_le_bytes());
    let range = Range::parse(bytes);
    assert_eq!((range.sector, range.sectors, range.flags), (5, 3, 1));
    assert_eq!(range.extent(8), Some(Extent { offset: 5 * 512, len: 3 * 512 }));
    assert_eq!(range.extent(7), None);
    assert!(range.unmap() && range.flags_are_known(false) && !range.flags_are_known(true));
    let huge = Range { sectors: MAX_RANGE_SECTORS + 1, ..range };
    assert_eq!(huge.extent(u64::MAX), None);
    let odd = Range { flags: 2, ..range };
    assert!(!odd.flags_are_known(false));
}
