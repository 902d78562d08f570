//! Bare-metal guests: a driver that writes nonsense into the queue of a disk. The device asks for a
//! reset, the machine goes on, and after the reset the disk works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use tardigrade_tests::baremetal::virtio::{
    DATA, Descriptor, Driver, HEADER, INDIRECT, NEEDS_RESET, NEXT, REQUEST_STATUS, SIZE, WRITE,
};
use tardigrade_tests::baremetal::{machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;

const GOOD_HEADER: Descriptor = Descriptor { address: HEADER, length: 16, flags: NEXT, next: 1 };
const GOOD_STATUS: Descriptor =
    Descriptor { address: REQUEST_STATUS, length: 1, flags: WRITE, next: 0 };

/// Lets a driver do wrong; the device must ask for a reset, and work after it.
fn needs_reset_after(wrong: impl Fn(&mut Driver<'_>)) {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with_disk(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    driver.prove_it_works(3);
    wrong(&mut driver);
    driver.wait_needs_reset();
    assert_eq!(vm.status(), "running");
    // A broken queue is left alone, whatever the driver says.
    driver.set_available_index(1);
    assert_ne!(driver.status() & NEEDS_RESET, 0);

    let mut driver = Driver::start(&mut guest);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    driver.prove_it_works(4);
    vm.quit();
    Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" }.check();
}

#[test]
fn a_chain_that_loops_needs_a_reset() {
    needs_reset_after(|driver| {
        let data = Descriptor { address: DATA, length: 512, flags: NEXT, next: 0 };
        driver.describe(&[GOOD_HEADER, data]);
        driver.submit(0);
    });
}

#[test]
fn a_buffer_outside_memory_needs_a_reset() {
    needs_reset_after(|driver| {
        let data = Descriptor { address: 1 << 40, length: 512, flags: NEXT | WRITE, next: 2 };
        driver.describe(&[GOOD_HEADER, data, GOOD_STATUS]);
        driver.submit(0);
    });
}

#[test]
fn a_buffer_that_wraps_around_needs_a_reset() {
    needs_reset_after(|driver| {
        let address = u64::MAX - 100;
        let data = Descriptor { address, length: 512, flags: NEXT | WRITE, next: 2 };
        driver.describe(&[GOOD_HEADER, data, GOOD_STATUS]);
        driver.submit(0);
    });
}

#[test]
fn a_buffer_over_the_end_of_memory_needs_a_reset() {
    needs_reset_after(|driver| {
        let address = (32 << 20) - 256;
        let data = Descriptor { address, length: 512, flags: NEXT | WRITE, next: 2 };
        driver.describe(&[GOOD_HEADER, data, GOOD_STATUS]);
        driver.submit(0);
    });
}

#[test]
fn an_available_index_too_far_ahead_needs_a_reset() {
    needs_reset_after(|driver| {
        driver.describe(&[GOOD_HEADER, Descriptor { next: 2, ..GOOD_STATUS }]);
        driver.set_available_index(0x8000);
    });
}

#[test]
fn a_head_beyond_the_table_needs_a_reset() {
    needs_reset_after(|driver| driver.submit(SIZE));
}

#[test]
fn a_next_beyond_the_table_needs_a_reset() {
    needs_reset_after(|driver| {
        driver.describe(&[Descriptor { next: 500, ..GOOD_HEADER }]);
        driver.submit(0);
    });
}

#[test]
fn an_indirect_table_of_odd_length_needs_a_reset() {
    needs_reset_after(|driver| {
        let table = Descriptor { address: DATA, length: 17, flags: INDIRECT, next: 0 };
        driver.describe(&[table]);
        driver.submit(0);
    });
}

#[test]
fn an_indirect_table_that_loops_needs_a_reset() {
    needs_reset_after(|driver| {
        driver.describe_at(DATA, &[GOOD_HEADER, Descriptor { next: 0, ..GOOD_HEADER }]);
        let table = Descriptor { address: DATA, length: 32, flags: INDIRECT, next: 0 };
        driver.describe(&[table]);
        driver.submit(0);
    });
}

#[test]
fn a_request_without_a_status_byte_needs_a_reset() {
    needs_reset_after(|driver| {
        driver.describe(&[Descriptor { flags: 0, ..GOOD_HEADER }]);
        driver.submit(0);
    });
}

#[test]
fn a_request_beyond_the_disk_fails_alone() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with_disk(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    let sectors = 16 << 11;
    assert_eq!(driver.transfer(0, sectors - 1), 0);
    for sector in [sectors, u64::MAX, u64::MAX >> 9] {
        assert_eq!(driver.transfer(0, sector), 1, "sector {sector} is read"); // S_IOERR
        assert_eq!(driver.transfer(1, sector), 1, "sector {sector} is written");
    }
    assert_eq!(driver.transfer(0x7777, 0), 2); // S_UNSUPP
    driver.prove_it_works(sectors - 1);
    vm.quit();
}

#[test]
fn a_device_that_needs_a_reset_still_does_after_a_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    driver.submit(SIZE);
    driver.wait_needs_reset();
    vm.save("broken", &["disk0"]);
    Driver::start(&mut guest).prove_it_works(1);
    vm.quit();
    let vm = spec.args(&["--loadvm", "broken"]).start();
    let mut guest = monitor(&vm);
    assert_ne!(guest.peek32(0xd000_0070) & NEEDS_RESET, 0);
    Driver::start(&mut guest).prove_it_works(2);
    vm.quit();
}
