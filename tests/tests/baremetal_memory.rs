//! Bare-metal guests: what is in RAM across checkpoints, in quantity.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::ops::Range;

use tardigrade_tests::baremetal::layout::{FREE, HIGH_RAM, LOW_RAM_MAX, SCRATCH};
use tardigrade_tests::baremetal::{Routine, machine, machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn pages(address: u64) -> Range<u64> {
    address..address + 2 * PAGE
}

#[test]
fn overwritten_memory_comes_back() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "160M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    let (used, untouched) = (FREE..128 * MIB, 130 * MIB..150 * MIB);
    guest.fill(used.clone(), 1);
    vm.save("filled", DISK);
    guest.fill(used.clone(), 2);
    guest.fill(untouched.clone(), 2);
    guest.verify(used.clone(), 2);

    vm.load("filled", DISK);
    guest.verify(used.clone(), 1);
    guest.verify_zero(untouched.clone());
    vm.quit();
    let vm = spec.args(&["--loadvm", "filled"]).start();
    let mut guest = monitor(&vm);
    guest.verify(used, 1);
    guest.verify_zero(untouched);
    vm.quit();
    Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" }.check();
}

#[test]
fn memory_that_became_zero_is_zero_after_a_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    let mut guest = monitor(&vm);
    let range = 16 * MIB..24 * MIB;
    guest.fill(range.clone(), 1);
    vm.save("full", DISK);
    vm.load("full", DISK);
    guest.verify(range.clone(), 1);
    // Every page is touched, and zero again.
    for address in range.clone().step_by(2 << 20) {
        guest.write(address, &[0; 512]);
    }
    vm.save("holes", DISK);
    guest.fill(range.clone(), 3);
    vm.load("holes", DISK);
    for address in range.clone().step_by(2 << 20) {
        guest.verify_zero(address..address + 512);
        guest.verify(address + 512..address + 2 * MIB, 1);
    }
    vm.load("full", DISK);
    guest.verify(range, 1);
    vm.quit();
}

#[test]
fn memory_on_both_sides_of_the_32_bit_hole_comes_back() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "3584M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    let ram_end = HIGH_RAM + 512 * MIB;
    let touched = [
        FREE,
        1536 * MIB,
        LOW_RAM_MAX - 2 * PAGE,
        HIGH_RAM,
        HIGH_RAM + 300 * MIB - PAGE,
        ram_end - 2 * PAGE,
    ]
    .map(pages);
    let untouched = [700 * MIB, LOW_RAM_MAX - 16 * MIB, HIGH_RAM + 128 * MIB].map(pages);
    for range in touched.clone() {
        guest.fill(range, 1);
    }
    vm.save("sparse", DISK);
    for range in touched.clone().into_iter().chain(untouched.clone()) {
        guest.fill(range, 2);
    }
    vm.load("sparse", DISK);
    for range in touched.clone() {
        guest.verify(range, 1);
    }
    for range in untouched.clone() {
        guest.verify_zero(range);
    }
    vm.quit();
    let file = Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" };
    assert!(file.allocated() < 16 * MIB, "zero pages are stored: {}", file.allocated());
    file.check();

    let vm = spec.args(&["--loadvm", "sparse"]).start();
    let mut guest = monitor(&vm);
    for range in touched {
        guest.verify(range, 1);
    }
    for range in untouched {
        guest.verify_zero(range);
    }
    vm.quit();
}

#[test]
fn there_is_no_memory_in_the_32_bit_hole_and_behind_the_end() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine(dir.path(), "3200M", 1).start();
    let mut guest = monitor(&vm);
    for address in [LOW_RAM_MAX, HIGH_RAM - PAGE * 2048, HIGH_RAM + 128 * MIB] {
        guest.poke(address, 0x1234);
        assert_eq!(guest.peek(address), u64::MAX, "something is at {address:#x}");
    }
    guest.poke(HIGH_RAM + 128 * MIB - 8, 0x1234);
    assert_eq!(guest.peek(HIGH_RAM + 128 * MIB - 8), 0x1234);
    vm.quit();
}

#[test]
fn a_string_of_bytes_arrives_whole_at_the_console() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    let text: Vec<u8> = (0..=255).cycle().take(3000).collect();
    guest.write(SCRATCH, &text);
    assert_eq!(guest.bytes_by(Routine::Transmit, SCRATCH, text.len()), text);
    assert_eq!(guest.bytes_by(Routine::TransmitString, SCRATCH, text.len()), text);
    vm.quit();
}
