//! What the tracker is told is never less than what really changed, whoever wrote it.

use snapshot::{Base, PageSet};
use tardigrade_tests::baremetal::Routine;
use tardigrade_tests::baremetal::apic;
use tardigrade_tests::baremetal::layout::{FREE, SCRATCH};
use tardigrade_tests::baremetal::virtio::{DATA, Driver};
use tardigrade_tests::require;
use vmm::memory::dirty_log::Protect;

use crate::support::{DISK, PAGE, Running, start};

const RAM: u64 = 64 << 20;
/// MSR_KVM_SYSTEM_TIME_NEW
const KVMCLOCK: u32 = 0x4b56_4d01;

/// Begins anew: RAM is that of a checkpoint now.
fn begin(vm: &Running) -> Vec<Vec<u8>> {
    let mut machine = vm.machine();
    machine.pause().unwrap();
    machine.start_tracking().unwrap();
    machine.note_written(Protect::Again).unwrap();
    machine.tracker().loaded(base());
    drop(machine);
    let before = vm.memory();
    vm.machine().resume().unwrap();
    before
}

fn base() -> Base {
    let snapshot = block::SnapshotInfo {
        id: "1".to_owned(),
        tag: "a".to_owned(),
        vm_state_size: 1,
        disk_size: DISK,
        date_sec: 0,
        date_nsec: 0,
        vm_clock_nsec: 0,
        icount: None,
    };
    Base { node: "disk0".to_owned(), snapshot, ram_offset: 4 << 20 }
}

/// Compares; gives the dirty pages.
fn end(vm: &Running, before: &[Vec<u8>]) -> PageSet {
    let mut machine = vm.machine();
    machine.pause().unwrap();
    machine.note_written(Protect::Again).unwrap();
    let dirty = machine.tracker().take();
    drop(machine);
    let after = vm.memory();
    for (region, (before, after)) in before.iter().zip(&after).enumerate() {
        let pages = before.chunks(4096).zip(after.chunks(4096));
        for (page, (before, after)) in (0..).zip(pages) {
            let told = dirty.contains(region, page);
            assert!(told || before == after, "page {page} of region {region} changed unseen");
        }
    }
    vm.machine().resume().unwrap();
    dirty
}

#[test]
fn what_vcpus_write_at_any_privilege_is_seen_in_every_round() {
    if !require::kvm() {
        return;
    }
    let mut vm = start(RAM, 2);
    apic::start_vcpu(&mut vm.guest, 1);
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..12 {
        let before = begin(&vm);
        for _ in 0..random.u64(0..6) {
            let from = FREE + random.u64(0..(RAM - FREE) / PAGE - 200) * PAGE;
            vm.guest.fill(from..from + random.u64(1..200) * PAGE - 16, round);
        }
        for _ in 0..random.u64(0..6) {
            vm.guest.poke(random.u64(FREE / 8..RAM / 8) * 8, round);
        }
        let from = FREE + random.u64(0..1000) * PAGE;
        vm.guest.start_on(1, Routine::Poke64, &[from, round]);
        vm.guest.answer_of(1);
        let dirty = end(&vm, &before);
        assert!(dirty.contains(0, from / PAGE), "round {round}");
        // No more than what is written, by much: 5 fills of 200 pages, and what the guest needs.
        assert!(dirty.count() < 1100, "round {round}: {} pages", dirty.count());
    }
}

#[test]
fn pages_left_unprotected_count_as_written_until_they_are_protected() {
    if !require::kvm() {
        return;
    }
    let mut vm = start(RAM, 1);
    let (left, other) = (FREE / PAGE, FREE / PAGE + 100);
    let look = |vm: &mut Running, protect: Protect, write: &[u64]| {
        for page in write {
            vm.guest.poke(page * PAGE, 1);
        }
        let mut machine = vm.machine();
        machine.pause().unwrap();
        machine.note_written(protect).unwrap();
        let written = machine.tracker().take();
        machine.resume().unwrap();
        [left, other].map(|page| written.contains(0, page))
    };
    begin(&vm);
    assert_eq!(look(&mut vm, Protect::Not, &[left]), [true, false]);
    assert_eq!(look(&mut vm, Protect::Not, &[other]), [true, true]);
    assert_eq!(look(&mut vm, Protect::Again, &[]), [true, true]);
    assert_eq!(look(&mut vm, Protect::Not, &[]), [false, false]);
    assert_eq!(look(&mut vm, Protect::Again, &[left]), [true, false]);
}

#[test]
fn what_a_disk_writes_is_seen() {
    if !require::kvm() {
        return;
    }
    let mut vm = start(RAM, 1);
    let mut driver = Driver::start(&mut vm.guest);
    driver.prove_it_works(7);
    vm.guest.fill(FREE..FREE + 0x1_0000, 3);
    for address in [DATA, FREE, FREE + 0x800, 40 << 20] {
        let before = begin(&vm);
        // It forgets where its queue is, and starts anew.
        let mut driver = Driver::start(&mut vm.guest);
        assert_eq!(driver.transfer_at(0, 5, address, 0x3000), 0);
        let dirty = end(&vm, &before);
        for page in address / PAGE..=(address + 0x2fff) / PAGE {
            assert!(dirty.contains(0, page), "page {page} was read from the disk");
        }
        let used = SCRATCH / PAGE + 2;
        assert!(dirty.contains(0, used), "the used ring");
        assert!(dirty.count() < 100, "{} pages", dirty.count());
    }
}

#[test]
fn what_kvm_writes_for_the_guests_clock_is_seen() {
    if !require::kvm() {
        return;
    }
    let mut vm = start(RAM, 1);
    let clock = 33 << 20;
    vm.guest.set_msr(KVMCLOCK, clock | 1);
    vm.guest.tsc();
    for _ in 0..3 {
        // It is written anew when the guest goes on.
        let before = begin(&vm);
        vm.guest.tsc();
        let dirty = end(&vm, &before);
        assert!(dirty.contains(0, clock / PAGE));
    }
}

#[test]
fn a_reset_makes_everything_dirty_and_turns_the_log_off() {
    if !require::kvm() {
        return;
    }
    let vm = start(RAM, 1);
    begin(&vm);
    let mut machine = vm.machine();
    assert!(machine.is_tracking());
    machine.pause().unwrap();
    let spec = machine.spec().clone();
    machine.boot(vmm::machine::prepare_boot(&spec).unwrap()).unwrap();
    assert!(!machine.is_tracking());
    assert_eq!(machine.tracker().base(), None);
    assert_eq!(machine.tracker().dirty().bytes(), RAM);
}
