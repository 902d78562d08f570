mod errors;
mod throttle;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::testing::{
    Desc, Driver, FakeDisk, HEADER, INDIRECT, PAYLOAD, REGION, STATUS, blk, readable, store_chain,
    writable, write_header,
};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const SECTORS: usize = 2048;

fn running() -> (Driver, Arc<FakeDisk>) {
    let disk = FakeDisk::new(SECTORS * 512, false);
    let mut driver = Driver::new(disk.device(1));
    driver.start();
    (driver, disk)
}

fn range(driver: &Driver, at: u64, sector: u64, sectors: u32, flags: u32) {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    driver.write(at, &bytes);
}

#[test]
fn read_brings_the_disks_bytes_across_a_region_boundary() {
    let (mut driver, disk) = running();
    let at = REGION - 700;
    write_header(&driver, IN, 3);
    let len = driver.request(0, &[readable(HEADER, 16), writable(at, 1024), writable(STATUS, 1)]);
    assert_eq!(len, 1025);
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
    assert_eq!(driver.bytes(at, 1024), disk.data.lock().unwrap()[3 * 512..5 * 512]);
}

#[test]
fn write_gathers_odd_segments_into_the_disk() {
    let (mut driver, disk) = running();
    let data: Vec<u8> = (0..1536u32).map(|i| (i * 7) as u8).collect();
    driver.write(PAYLOAD, &data);
    let segments =
        [readable(PAYLOAD, 1), readable(PAYLOAD + 1, 1000), readable(PAYLOAD + 1001, 535)];
    assert_eq!(blk(&mut driver, OUT, 10, &segments), OK);
    assert_eq!(disk.data.lock().unwrap()[5120..5120 + 1536], data);
    assert_eq!(disk.take_log(), ["write 5120 1536"]);
}

#[test]
fn flush_reaches_the_image() {
    let (mut driver, disk) = running();
    assert_eq!(blk(&mut driver, FLUSH, 0, &[]), OK);
    assert_eq!(disk.take_log(), ["flush"]);
}

#[test]
fn writes_are_flushed_each_for_a_driver_without_flush() {
    let (mut driver, disk) = running();
    driver.features &= !(1 << VIRTIO_BLK_F_FLUSH);
    driver.start();
    assert_eq!(blk(&mut driver, OUT, 0, &[readable(PAYLOAD, 512)]), OK);
    assert_eq!(disk.take_log(), ["write 0 512", "flush"]);
    range(&driver, PAYLOAD, 0, 8, 0);
    assert_eq!(blk(&mut driver, WRITE_ZEROES, 0, &[readable(PAYLOAD, 16)]), OK);
    assert_eq!(disk.take_log(), ["zero 0 4096 false", "flush"]);
}

#[test]
fn get_id_gives_the_serial_padded_with_zeroes() {
    let (mut driver, _) = running();
    driver.write(PAYLOAD, &[0xff; 21]);
    assert_eq!(blk(&mut driver, GET_ID, 0, &[writable(PAYLOAD, 20)]), OK);
    let mut want = b"SERIAL-1".to_vec();
    want.resize(20, 0);
    want.push(0xff);
    assert_eq!(driver.bytes(PAYLOAD, 21), want);
}

#[test]
fn discard_and_write_zeroes_take_several_ranges() {
    let (mut driver, disk) = running();
    range(&driver, PAYLOAD, 8, 8, 0);
    range(&driver, PAYLOAD + 16, 32, 16, 0);
    assert_eq!(blk(&mut driver, DISCARD, 0, &[readable(PAYLOAD, 32)]), OK);
    assert_eq!(disk.take_log(), ["discard 4096 4096", "discard 16384 8192"]);
    range(&driver, PAYLOAD, 1, 1, 1);
    assert_eq!(blk(&mut driver, WRITE_ZEROES, 0, &[readable(PAYLOAD, 16)]), OK);
    assert_eq!(disk.take_log(), ["zero 512 512 true"]);
    assert_eq!(disk.data.lock().unwrap()[512..1024], [0; 512]);
}

#[test]
fn bad_requests_fail_alone_and_touch_nothing() {
    let (mut driver, disk) = running();
    let sectors = SECTORS as u64;
    type Case<'a> = (&'a str, u32, u64, Vec<Desc>, u8);
    let cases: Vec<Case> = vec![
        ("read past the end", IN, sectors, vec![writable(PAYLOAD, 512)], IOERR),
        ("read across the end", IN, sectors - 1, vec![writable(PAYLOAD, 1024)], IOERR),
        ("sector overflow", OUT, u64::MAX, vec![readable(PAYLOAD, 512)], IOERR),
        ("odd length", OUT, 0, vec![readable(PAYLOAD, 100)], IOERR),
        ("unknown type", 99, 0, vec![], UNSUPP),
        ("secure erase", 14, 0, vec![], UNSUPP),
        ("no ranges", DISCARD, 0, vec![], IOERR),
        ("half a range", DISCARD, 0, vec![readable(PAYLOAD, 24)], IOERR),
        ("too many ranges", DISCARD, 0, vec![readable(PAYLOAD, 17 * 16)], IOERR),
    ];
    driver.write(PAYLOAD, &[0; 4096]);
    for (name, kind, sector, data, want) in cases {
        assert_eq!(blk(&mut driver, kind, sector, &data), want, "{name}");
        assert!(disk.take_log().is_empty(), "{name}");
    }
    for (name, kind, sector, count, flags, want) in [
        ("discard past the end", DISCARD, sectors, 1, 0, IOERR),
        ("discard overflow", DISCARD, u64::MAX, 1, 0, IOERR),
        ("discard too large", DISCARD, 0, u32::MAX, 0, IOERR),
        ("discard with unmap", DISCARD, 0, 8, 1, UNSUPP),
        ("write-zeroes flags", WRITE_ZEROES, 0, 8, 2, UNSUPP),
    ] {
        // A good range first: nothing is done unless all are good.
        range(&driver, PAYLOAD, 0, 8, 0);
        range(&driver, PAYLOAD + 16, sector, count, flags);
        assert_eq!(blk(&mut driver, kind, 0, &[readable(PAYLOAD, 32)]), want, "{name}");
        assert!(disk.take_log().is_empty(), "{name}");
    }
    assert_eq!(blk(&mut driver, IN, 0, &[writable(PAYLOAD, 512)]), OK);
}

#[test]
fn host_errors_become_ioerr() {
    let (mut driver, disk) = running();
    disk.fail.store(true, Ordering::SeqCst);
    for (kind, data) in
        [(IN, vec![writable(PAYLOAD, 512)]), (OUT, vec![readable(PAYLOAD, 512)]), (FLUSH, vec![])]
    {
        assert_eq!(blk(&mut driver, kind, 0, &data), IOERR);
    }
    disk.fail.store(false, Ordering::SeqCst);
    assert_eq!(blk(&mut driver, FLUSH, 0, &[]), OK);
}

#[test]
fn read_only_disk_says_so_and_refuses_changes() {
    let disk = FakeDisk::new(SECTORS * 512, true);
    let device = disk.device(1);
    assert_eq!(device.device_features() & (1 << VIRTIO_BLK_F_RO), 1 << VIRTIO_BLK_F_RO);
    assert_eq!(device.device_features() & (1 << VIRTIO_BLK_F_DISCARD), 0);
    let mut driver = Driver::new(device);
    driver.start();
    range(&driver, PAYLOAD, 0, 8, 0);
    for (kind, len) in [(OUT, 512), (DISCARD, 16), (WRITE_ZEROES, 16)] {
        assert_eq!(blk(&mut driver, kind, 0, &[readable(PAYLOAD, len)]), IOERR);
    }
    assert!(disk.take_log().is_empty());
    assert_eq!(blk(&mut driver, IN, 0, &[writable(PAYLOAD, 512)]), OK);
}

#[test]
fn longest_indirect_request_is_served() {
    let (mut driver, disk) = running();
    let table = PAYLOAD + 0x10_0000;
    let mut descs = vec![readable(HEADER, 16)];
    descs.extend((0..254).map(|i| writable(PAYLOAD + i * 512, 512)));
    descs.push(writable(STATUS, 1));
    write_header(&driver, IN, 1);
    store_chain(&driver.mem, table, 0, &descs);
    let indirect = Desc { flags: INDIRECT, ..readable(table, descs.len() as u32 * 16) };
    driver.request(0, &[indirect]);
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
    assert_eq!(driver.bytes(PAYLOAD, 254 * 512), disk.data.lock().unwrap()[512..255 * 512]);
}

#[test]
fn all_queues_are_served() {
    let disk = FakeDisk::new(SECTORS * 512, false);
    let mut driver = Driver::new(disk.device(4));
    driver.start();
    for queue in [3, 0, 2, 1] {
        write_header(&driver, IN, queue as u64);
        driver.request(queue, &[readable(HEADER, 16), writable(PAYLOAD, 512), writable(STATUS, 1)]);
        assert_eq!(driver.bytes(STATUS, 1), [OK]);
        let at = queue * 512;
        assert_eq!(driver.bytes(PAYLOAD, 512), disk.data.lock().unwrap()[at..at + 512]);
    }
}

#[test]
fn a_queue_full_of_requests_is_served_with_and_without_event_index() {
    let (mut driver, _) = running();
    for event_idx in [true, false] {
        driver.features = driver.features & !(1 << 29) | u64::from(event_idx) << 29;
        driver.start();
        write_header(&driver, FLUSH, 0);
        // 128 requests of two descriptors, ten rounds: more than one batch, and the ring wraps.
        for i in 0..128 {
            let descs = [readable(HEADER, 16), writable(STATUS, 1)];
            store_chain(&driver.mem, driver.rings[0].desc, i * 2, &descs);
        }
        for _ in 0..10 {
            for i in 0..128 {
                driver.offer(0, i * 2);
            }
            driver.kick(0);
            // Those of one batch end before or after those of another.
            let mut heads: Vec<u32> = (0..128).map(|_| driver.wait_used(0).0).collect();
            heads.sort_unstable();
            let want: Vec<u32> = (0..128).map(|i| i * 2).collect();
            assert_eq!(heads, want, "event index {event_idx}");
        }
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let disk = FakeDisk::new(512, false);
    let node = || Arc::new(::block::Node::new("d", disk.clone() as Arc<dyn ::block::Format>));
    let options = |serial: &str, num_queues| BlockOptions { serial: serial.into(), num_queues };
    assert!(BlockDevice::new(node(), options(&"x".repeat(20), 64)).is_ok());
    for bad in [options(&"x".repeat(21), 1), options("", 0), options("", 65)] {
        assert!(BlockDevice::new(node(), bad).is_err());
    }
}
