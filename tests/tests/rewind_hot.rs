//! Rewinds of a guest that writes many pages of the same parts of RAM each time. Such parts become
//! hot: they are not logged, and put back whole. Nothing of that is to be seen in what the guest finds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::ops::Range;
use std::path::Path;

use serde_json::json;
use tardigrade_tests::baremetal::layout::{FREE, PML4, SCRATCH};
use tardigrade_tests::baremetal::virtio::{DATA, Driver};
use tardigrade_tests::baremetal::{Monitor, Routine, apic, machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events;
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// What may be hot at once.
const PART: u64 = 2 * MIB;
const USED: Range<u64> = FREE..48 * MIB;
/// What the guest writes to until it is hot, and the rest of its part.
const WRITTEN: Range<u64> = 8 * MIB..9 * MIB;
const BESIDE: Range<u64> = 9 * MIB..10 * MIB;
/// Loads by which what is written each time has become hot.
const LOADS: u64 = 60;

/// A machine whose memory is filled with 1 in checkpoint "one".
fn saved(dir: &Path) -> (Vm, Monitor) {
    let mut vm = machine_with_disk(dir, "64M", 2).start();
    let mut guest = monitor(&vm);
    guest.fill(USED, 1);
    vm.save("one", DISK);
    (vm, guest)
}

/// Loads "one" until what `run` writes in between is hot, where KVM is such that anything becomes so.
fn heat(vm: &mut Vm, guest: &mut Monitor, mut run: impl FnMut(&mut Monitor, u64)) {
    for round in 0..LOADS {
        run(guest, 1000 + round);
        vm.load("one", DISK);
        if whole(vm) > 0 {
            break;
        }
    }
    assert_eq!(whole(vm) > 0, !nested_paging(), "{} bytes are put back whole", whole(vm));
}

/// Bytes of RAM in hot parts.
fn whole(vm: &Vm) -> u64 {
    vm.qmp().execute("x-query-load", json!({})).unwrap()["rewound-whole"].as_u64().unwrap()
}

fn rewinds(vm: &Vm) -> u64 {
    vm.qmp().execute("x-query-load", json!({})).unwrap()["rewinds"].as_u64().unwrap()
}

/// Whether the host's KVM forgets nothing at a rewind, so that there is no use in hot parts.
fn nested_paging() -> bool {
    ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"].iter().any(|parameter| {
        let text = std::fs::read_to_string(format!("/sys/module/{parameter}"));
        text.is_ok_and(|text| ["Y", "1"].contains(&text.trim()))
    })
}

fn save(vm: &mut Vm, tag: &str, mode: &str) {
    let mut arguments = events::target(tag, DISK);
    arguments["x-mode"] = json!(mode);
    vm.job_with("snapshot-save", arguments).unwrap();
}

fn check(dir: &Path) {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }.check();
}

#[test]
fn hot_memory_is_that_of_the_checkpoint_every_time() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = saved(dir.path());
    heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
    for round in 2..60 {
        // All of the part, some of it, nothing of it; and what is logged beside it.
        match round % 3 {
            0 => guest.fill(WRITTEN.start..BESIDE.end, round),
            1 => guest.poke(BESIDE.start + round * PAGE, round),
            _ => guest.fill(30 * MIB..30 * MIB + 3 * PAGE, round),
        }
        guest.poke(WRITTEN.start - 8, round);
        guest.poke(BESIDE.end, round);
        vm.load("one", DISK);
        guest.verify(WRITTEN.start - PAGE..BESIDE.end + PAGE, 1);
        guest.verify(30 * MIB..30 * MIB + 3 * PAGE, 1);
    }
    guest.verify(USED, 1);
    assert_eq!(whole(&vm), if nested_paging() { 0 } else { PART });
    // Other parts become hot beside it.
    let others = [12 * MIB..13 * MIB, 20 * MIB..22 * MIB];
    for round in 0..LOADS {
        for part in others.clone() {
            guest.fill(part, round);
        }
        vm.load("one", DISK);
        for part in others.clone() {
            guest.verify(part, 1);
        }
    }
    guest.verify(USED, 1);
    assert_eq!(whole(&vm), if nested_paging() { 0 } else { 3 * PART });
    // Each load went the short way, also those that made parts of RAM hot.
    assert!(rewinds(&vm) > 57 + LOADS, "{}", rewinds(&vm));
    vm.quit();
    check(dir.path());
}

#[test]
fn a_checkpoint_of_hot_memory_has_all_that_was_written() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = saved(dir.path());
    for (mode, seed) in [("live", 50), ("stop", 60)] {
        heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
        guest.fill(WRITTEN.start..WRITTEN.start + 7 * PAGE, seed);
        guest.poke(BESIDE.start, seed);
        guest.fill(20 * MIB..20 * MIB + PAGE, seed);
        save(&mut vm, mode, mode);
        // A checkpoint built upon one that was saved out of hot memory.
        guest.fill(WRITTEN.start + 2 * PAGE..WRITTEN.start + 9 * PAGE, seed + 1);
        save(&mut vm, &format!("{mode}2"), mode);
        guest.fill(USED, seed + 2);
        for (tag, from) in [(mode.to_owned(), 7), (format!("{mode}2"), 2), (mode.to_owned(), 7)] {
            for _ in 0..3 {
                vm.load(&tag, DISK);
                let (middle, end) = (WRITTEN.start + from * PAGE, WRITTEN.start + 9 * PAGE);
                guest.verify(WRITTEN.start..middle, seed);
                guest.verify(middle..end, if from == 2 { seed + 1 } else { 1 });
                guest.verify(end..BESIDE.start, 1);
                assert_eq!(guest.peek(BESIDE.start), seed);
                guest.verify(BESIDE.start + PAGE..20 * MIB, 1);
                guest.verify(20 * MIB..20 * MIB + PAGE, seed);
                guest.fill(WRITTEN.start..BESIDE.end, 9);
            }
        }
        vm.load("one", DISK);
        guest.verify(USED, 1);
    }
    vm.quit();
    check(dir.path());
}

#[test]
fn a_guest_that_never_ceases_to_write_hot_memory_is_one_instant_in_each_checkpoint() {
    if !require::kvm() {
        return;
    }
    const PAGES: u64 = 1200;
    const STOP: u64 = SCRATCH + 0x8000;
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 2).start();
    let mut guest = monitor(&vm);
    apic::start_vcpu(&mut guest, 1);
    guest.poke(STOP, 0);
    guest.start_on(1, Routine::User, &[Routine::Chain as u64, FREE, PAGES, STOP]);
    // Each page was looked at and written, twice.
    let round = |guest: &mut Monitor| {
        let now = guest.peek(FREE);
        guest.wait_word(FREE, |count| count > now + 2 * PAGES);
    };
    round(&mut guest);
    vm.save("one", DISK);
    for tag in ["two", "three"] {
        heat(&mut vm, &mut guest, |guest, _| round(guest));
        round(&mut guest);
        save(&mut vm, tag, "live");
        // Nothing of a live save is left unlogged.
        assert_eq!(whole(&vm), 0);
        for _ in 0..LOADS / 2 {
            round(&mut guest);
            vm.load(tag, DISK);
        }
        round(&mut guest);
        save(&mut vm, &format!("{tag}-stop"), "stop");
        round(&mut guest);
        vm.load(tag, DISK);
        round(&mut guest);
        vm.load(&format!("{tag}-stop"), DISK);
        round(&mut guest);
        vm.load("one", DISK);
        round(&mut guest);
    }
    guest.poke(STOP, 1);
    assert_eq!(guest.answer_of(1), 0, "a page is not of the same moment as the others");
    vm.quit();
    check(dir.path());
}

#[test]
fn what_a_device_writes_to_hot_memory_goes_back_and_is_saved() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 2).start();
    let mut guest = monitor(&vm);
    guest.fill(DATA..DATA + 512, 5);
    assert_eq!(Driver::start(&mut guest).transfer(1, 3), 0);
    guest.fill(USED, 1);
    vm.save("one", DISK);
    heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
    let at = WRITTEN.start + 5 * PAGE;
    let words = |guest: &mut Monitor, at: u64| [0, 8, 248, 504].map(|word| guest.peek(at + word));
    let written = words(&mut guest, DATA);
    let read = |guest: &mut Monitor| {
        assert_eq!(Driver::start(guest).transfer_at(0, 3, at, 512), 0);
        assert_eq!(words(guest, at), written);
    };
    for _ in 0..5 {
        read(&mut guest);
        vm.load("one", DISK);
        guest.verify(WRITTEN.start..BESIDE.end, 1);
    }
    for mode in ["live", "stop"] {
        heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
        read(&mut guest);
        save(&mut vm, mode, mode);
        vm.load("one", DISK);
        guest.verify(USED, 1);
        vm.load(mode, DISK);
        assert_eq!(words(&mut guest, at), written);
        guest.verify(at + PAGE..USED.end, 1);
        vm.load("one", DISK);
    }
    vm.quit();
    check(dir.path());
}

#[test]
fn page_tables_code_and_stacks_may_be_in_hot_memory() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = saved(dir.path());
    // Of the part with the guest's tables: 128 pages.
    let free = SCRATCH + 0x4_0000..FREE;
    heat(&mut vm, &mut guest, |guest, round| guest.fill(free.clone(), round));
    // The entry of the first page directory for the 2 MiB at 32 MiB.
    let (entry, address) = (PML4 + 0x2000 + 16 * 8, 32 * MIB);
    let wanted = guest.peek(address);
    let original = guest.peek(entry);
    let other = guest.peek(address + PART);
    assert_ne!(wanted, other);
    for _ in 0..LOADS {
        guest.poke(entry, original + PART);
        let cr3 = guest.call(Routine::ReadCr, &[3]);
        guest.call(Routine::WriteCr3, &[cr3]);
        assert_eq!(guest.peek(address), other);
        vm.load("one", DISK);
        assert_eq!(guest.peek(address), wanted);
        guest.verify_zero(free.clone());
    }
    guest.verify(USED, 1);
    vm.quit();
    check(dir.path());
}

#[test]
fn a_reset_and_a_load_of_another_checkpoint_end_hot_memory() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut guest) = saved(dir.path());
    guest.fill(WRITTEN, 2);
    vm.save("two", DISK);
    heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
    guest.fill(WRITTEN, 3);
    vm.load("two", DISK);
    assert_eq!(whole(&vm), 0);
    guest.verify(WRITTEN, 2);
    guest.verify(BESIDE.start..USED.end, 1);
    heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
    vm.qmp().execute("system_reset", json!({})).unwrap();
    guest.wait_started();
    assert_eq!(whole(&vm), 0);
    guest.verify_zero(USED);
    guest.fill(WRITTEN, 4);
    vm.save("three", DISK);
    vm.load("one", DISK);
    guest.verify(USED, 1);
    vm.load("three", DISK);
    guest.verify(WRITTEN, 4);
    guest.verify_zero(BESIDE.start..USED.end);
    // Much beside the hot part was written, and the guest stands.
    vm.load("one", DISK);
    heat(&mut vm, &mut guest, |guest, round| guest.fill(WRITTEN, round));
    guest.fill(USED, 6);
    vm.qmp().execute("stop", json!({})).unwrap();
    vm.load("one", DISK);
    vm.qmp().execute("cont", json!({})).unwrap();
    guest.verify(USED, 1);
    vm.quit();
    check(dir.path());
}
