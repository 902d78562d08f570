//! Requests of a disk with limits: what was done is counted against what there was time for.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use ::block::throttle::{Kind, Limits, Rate, ThrottleGroup};

use super::*;

/// A disk with limits, and the time in milliseconds.
fn limited(
    limits: Limits,
    queues: u16,
) -> (Driver, Arc<FakeDisk>, Arc<IoThrottle>, Arc<AtomicU64>) {
    let disk = FakeDisk::new(SECTORS * 512, false);
    let device = disk.device(queues);
    let throttle = Arc::clone(device.throttle());
    let time = Arc::new(AtomicU64::new(0));
    throttle.set_group(Some(Arc::new(group(limits, &time))));
    let mut driver = Driver::new(device);
    driver.start();
    (driver, disk, throttle, time)
}

fn group(limits: Limits, time: &Arc<AtomicU64>) -> ThrottleGroup {
    let time = Arc::clone(time);
    let clock = Box::new(move || Duration::from_millis(time.load(Ordering::SeqCst)));
    ThrottleGroup::new("g", limits, clock)
}

fn bytes_of_writes(rate: u64) -> Limits {
    let bytes = Kind { write: Rate::steady(rate), ..Kind::default() };
    Limits { bytes, ..Limits::default() }
}

/// Offers so many writes of a sector each.
fn offer_writes(driver: &mut Driver, count: u16) {
    write_header(driver, OUT, 0);
    for index in 0..count {
        let descs = [readable(HEADER, 16), readable(PAYLOAD, 512), writable(STATUS, 1)];
        store_chain(&driver.mem, driver.rings[0].desc, index * 3, &descs);
        driver.offer(0, index * 3);
    }
    driver.kick(0);
}

/// Lets the time pass, and waits until so many more are done.
fn pass(driver: &mut Driver, time: &AtomicU64, now: u64, done: usize) {
    time.store(now, Ordering::SeqCst);
    driver.dev.look().unwrap();
    for _ in 0..done {
        driver.wait_used(0);
    }
}

/// The device has gone through all it has: a read that is not limited has its turn after the writes.
fn settle(driver: &mut Driver) {
    // A header of its own: those of the writes may not have been read yet.
    let (header, status) = (HEADER + 0x200, STATUS + 0x200);
    let mut words = IN.to_le_bytes().to_vec();
    words.resize(16, 0);
    driver.write(header, &words);
    let at = driver.rings[0].size as u16 - 3;
    let descs = [readable(header, 16), writable(PAYLOAD + 0x1000, 512), writable(status, 1)];
    store_chain(&driver.mem, driver.rings[0].desc, at, &descs);
    driver.offer(0, at);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).0, u32::from(at), "more was done than there was time for");
}

fn writes(disk: &FakeDisk) -> usize {
    disk.log.lock().unwrap().iter().filter(|line| line.starts_with("write")).count()
}

#[test]
fn as_much_is_done_as_there_is_time_for() {
    // Room for 1024 bytes, and 10240 a second.
    let (mut driver, disk, _, time) = limited(bytes_of_writes(10_240), 1);
    offer_writes(&mut driver, 20);
    // 512 bytes beyond the room are let through.
    pass(&mut driver, &time, 0, 3);
    settle(&mut driver);
    assert_eq!(writes(&disk), 3);
    // 50 ms are 512 bytes.
    for (now, done) in [(50, 1), (99, 0), (100, 1), (250, 3), (251, 0)] {
        let before = writes(&disk);
        pass(&mut driver, &time, now, done);
        settle(&mut driver);
        assert_eq!(writes(&disk), before + done, "after {now} ms");
    }
}

#[test]
fn a_pause_waits_for_no_bucket() {
    let (mut driver, disk, _, time) = limited(bytes_of_writes(1), 1);
    offer_writes(&mut driver, 20);
    pass(&mut driver, &time, 0, 1);
    settle(&mut driver);
    assert_eq!(writes(&disk), 1);
    driver.dev.pause().unwrap();
    assert_eq!(writes(&disk), 20);
    driver.dev.resume().unwrap();
    // They were paid for.
    offer_writes(&mut driver, 1);
    for _ in 0..19 {
        driver.wait_used(0);
    }
    settle(&mut driver);
    assert_eq!(writes(&disk), 20);
    driver.dev.shutdown().unwrap();
    assert_eq!(writes(&disk), 21);
}

#[test]
fn limits_that_are_lifted_let_go_what_waits() {
    let (mut driver, disk, throttle, time) = limited(bytes_of_writes(1), 1);
    offer_writes(&mut driver, 20);
    pass(&mut driver, &time, 0, 1);
    throttle.group().unwrap().set_limits(bytes_of_writes(1 << 40));
    pass(&mut driver, &time, 0, 19);
    assert_eq!(writes(&disk), 20);
    throttle.group().unwrap().set_limits(bytes_of_writes(1));
    offer_writes(&mut driver, 5);
    pass(&mut driver, &time, 0, 1);
    throttle.set_group(None);
    pass(&mut driver, &time, 0, 4);
}

#[test]
fn disks_of_a_group_share_its_limits() {
    let (mut one, disk, throttle, time) = limited(bytes_of_writes(10_240), 1);
    let other_disk = FakeDisk::new(SECTORS * 512, false);
    let device = other_disk.device(1);
    device.throttle().set_group(throttle.group());
    let mut other = Driver::new(device);
    other.start();
    offer_writes(&mut one, 10);
    pass(&mut one, &time, 0, 3);
    settle(&mut one);
    offer_writes(&mut other, 10);
    settle(&mut other);
    assert_eq!((writes(&disk), writes(&other_disk)), (3, 0));
    // They take turns.
    for turn in 1..=6 {
        time.store(turn * 50, Ordering::SeqCst);
        one.dev.look().unwrap();
        other.dev.look().unwrap();
        if turn % 2 == 1 {
            one.wait_used(0)
        } else {
            other.wait_used(0)
        };
    }
    assert_eq!((writes(&disk), writes(&other_disk)), (6, 3));
}

#[test]
fn requests_that_are_offered_again_before_they_are_done_wait_in_their_ring() {
    let (mut driver, disk, throttle, time) = limited(bytes_of_writes(1), 1);
    offer_writes(&mut driver, 1);
    driver.wait_used(0);
    let size = u16::try_from(driver.rings[0].size).unwrap();
    let again = |driver: &mut Driver, count| {
        write_header(driver, OUT, 0);
        (0..count).for_each(|_| driver.offer(0, 0));
        driver.kick(0);
    };
    again(&mut driver, size / 2);
    settle(&mut driver);
    again(&mut driver, size / 2 - 1);
    settle(&mut driver);
    // One of these is taken; not even a read is, behind them.
    again(&mut driver, size / 2);
    throttle.set_group(None);
    let all = usize::from(size / 2 * 3 - 1);
    pass(&mut driver, &time, 0, all);
    assert_eq!(writes(&disk), 1 + all);
}
