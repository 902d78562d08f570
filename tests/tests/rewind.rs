//! Loads of the checkpoint that the guest runs from, again and again: the same guest every time,
//! whatever it has done in between.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::ops::Range;
use std::path::Path;

use serde_json::json;
use tardigrade_tests::baremetal::layout::{FREE, PML4};
use tardigrade_tests::baremetal::virtio::{DATA, Driver};
use tardigrade_tests::baremetal::{Monitor, Routine, machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events::{run, target};
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;
const USED: Range<u64> = FREE..96 * MIB;

/// A machine whose memory is filled with 1 in checkpoint "one".
fn saved(dir: &Path) -> (Vm, Monitor) {
    let mut vm = machine_with_disk(dir, "160M", 2).start();
    let mut guest = monitor(&vm);
    guest.fill(USED, 1);
    vm.save("one", DISK);
    (vm, guest)
}

/// The same, loaded the long way.
fn loaded(dir: &Path) -> (Vm, Monitor) {
    let (mut vm, mut guest) = saved(dir);
    // Too much to be put back.
    guest.fill(USED, 0);
    vm.load("one", DISK);
    assert_eq!(rewinds(&vm), 0);
    (vm, guest)
}

/// How many loads were done the short way.
fn rewinds(vm: &Vm) -> u64 {
    vm.qmp().execute("x-query-load", json!({})).unwrap()["rewinds"].as_u64().unwrap()
}

fn check(dir: &Path) {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }.check();
}

#[test]
fn memory_is_that_of_the_checkpoint_every_time() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = loaded(dir.path());
    for round in 2..12 {
        // Other pages every time, some of them every time.
        guest.fill(4 * MIB..5 * MIB, round);
        guest.fill(round * 7 * MIB..round * 7 * MIB + 3 * 4096, round);
        guest.poke(150 * MIB, round);
        vm.load("one", DISK);
        guest.verify(4 * MIB..5 * MIB, 1);
        guest.verify_zero(150 * MIB..150 * MIB + 4096);
    }
    guest.verify(USED, 1);
    assert_eq!(rewinds(&vm), 10);
    vm.quit();
    check(dir.path());
}

#[test]
fn the_first_load_after_a_save_is_a_way_back_too() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = saved(dir.path());
    for (round, tag) in (2..).zip(["one", "two", "three"]) {
        if tag != "one" {
            // What was put back before is in the next one.
            guest.fill(4 * MIB..6 * MIB, round);
            vm.save(tag, DISK);
        }
        for other in 0..3 {
            guest.fill(5 * MIB..9 * MIB, 20 + other);
            vm.load(tag, DISK);
            guest.verify(4 * MIB..6 * MIB, if tag == "one" { 1 } else { round });
            // No more: what is read may count as written, where KVM shadows page tables.
            guest.verify(6 * MIB..10 * MIB, 1);
        }
    }
    assert_eq!(rewinds(&vm), 9);
    guest.verify(6 * MIB..USED.end, 1);
    // Another checkpoint is not taken for it.
    guest.fill(4 * MIB..6 * MIB, 9);
    vm.load("one", DISK);
    assert_eq!(rewinds(&vm), 9);
    guest.verify(USED, 1);
    vm.quit();
    check(dir.path());
}

#[test]
fn pages_that_are_written_now_and_then_are_put_back_every_time() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = loaded(dir.path());
    // Longer than pages are left unprotected; each has turns in which it is written and such in
    // which it is not.
    for round in 0..80 {
        for page in [2, 3, 5, 7, 40].into_iter().filter(|n| round % n == 0) {
            guest.poke(8 * MIB + page * 4096, round);
        }
        if round == 50 {
            guest.fill(20 * MIB..30 * MIB, 2);
        }
        vm.load("one", DISK);
        guest.verify(8 * MIB..8 * MIB + 41 * 4096, 1);
    }
    guest.verify(USED, 1);
    assert_eq!(rewinds(&vm), 80);
    // What counts as written, and is not, is right in a checkpoint all the same.
    guest.poke(8 * MIB, 77);
    vm.save("two", DISK);
    guest.fill(USED, 3);
    vm.load("two", DISK);
    assert_eq!(guest.peek(8 * MIB), 77);
    guest.verify(8 * MIB + 4096..USED.end, 1);
    vm.quit();
    check(dir.path());
}

#[test]
fn a_guest_that_wrote_a_lot_goes_back_too() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = loaded(dir.path());
    for round in 2..4 {
        guest.fill(USED, round);
        vm.load("one", DISK);
        guest.verify(USED, 1);
    }
    assert_eq!(rewinds(&vm), 0);
    vm.quit();
}

#[test]
fn a_disk_that_was_written_goes_back_too() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, guest) = loaded(dir.path());
    drop(guest);
    for round in 0..6 {
        let mut guest = Monitor::connect(vm.serial_path());
        guest.fill(8 * MIB..9 * MIB, 5);
        let writes = round % 2 == 0;
        if writes {
            guest.fill(DATA..DATA + 512, 9);
            assert_eq!(Driver::start(&mut guest).transfer(1, 5), 0);
        }
        drop(guest);
        vm.load("one", DISK);
        let mut guest = Monitor::connect(vm.serial_path());
        guest.verify(8 * MIB..9 * MIB, 1);
        assert_eq!(Driver::start(&mut guest).transfer(0, 5), 0);
        guest.verify_zero(DATA..DATA + 512);
    }
    assert_eq!(rewinds(&vm), 3);
    vm.quit();
    check(dir.path());
}

#[test]
fn page_tables_that_the_guest_changed_are_those_of_the_checkpoint() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = loaded(dir.path());
    // The entry of the first page directory for the 2 MiB at 32 MiB.
    let (entry, address) = (PML4 + 0x2000 + 16 * 8, 32 * MIB);
    let wanted = guest.peek(address);
    let original = guest.peek(entry);
    let other = guest.peek(address + 2 * MIB);
    assert_ne!(wanted, other);
    for _ in 0..5 {
        guest.poke(entry, original + 2 * MIB);
        let cr3 = guest.call(Routine::ReadCr, &[3]);
        guest.call(Routine::WriteCr3, &[cr3]);
        assert_eq!(guest.peek(address), other);
        vm.load("one", DISK);
        assert_eq!(guest.peek(address), wanted);
        guest.verify(address..address + 2 * MIB, 1);
    }
    assert_eq!(rewinds(&vm), 5);
    vm.quit();
}

#[test]
fn a_load_of_another_checkpoint_is_not_taken_for_a_way_back() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = loaded(dir.path());
    let small = FREE..FREE + MIB;
    guest.fill(small.clone(), 2);
    vm.save("two", DISK);
    guest.fill(small.clone(), 3);
    vm.load("one", DISK);
    guest.verify(small.clone(), 1);
    vm.load("two", DISK);
    guest.verify(small.clone(), 2);
    // The same name, another checkpoint.
    vm.load("one", DISK);
    vm.delete("one", DISK);
    guest.fill(small.clone(), 4);
    vm.save("one", DISK);
    guest.fill(small.clone(), 5);
    vm.load("one", DISK);
    guest.verify(small.clone(), 4);
    guest.fill(small.clone(), 6);
    vm.load("one", DISK);
    guest.verify(small, 4);
    guest.verify(FREE + MIB..USED.end, 1);
    vm.quit();
    check(dir.path());
}

#[test]
fn a_way_back_looks_like_any_load_to_a_client() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (vm, mut guest) = loaded(dir.path());
    guest.poke(USED.start, 0);
    let story = run(&vm, "snapshot-load", target("one", DISK));
    let events = ["created", "running", "STOP", "RESUME", "waiting", "pending", "concluded"];
    assert_eq!(story, (events.map(str::to_owned).to_vec(), None));
    let mut qmp = vm.qmp();
    qmp.execute("stop", json!({})).unwrap();
    let story = run(&vm, "snapshot-load", target("one", DISK));
    let events = ["created", "running", "waiting", "pending", "concluded"];
    assert_eq!(story, (events.map(str::to_owned).to_vec(), None));
    assert_eq!(vm.status(), "paused");
    assert_eq!(rewinds(&vm), 2);
    qmp.execute("cont", json!({})).unwrap();
    guest.verify(USED, 1);
    vm.quit();
}
