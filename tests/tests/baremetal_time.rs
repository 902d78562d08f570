//! Bare-metal guests: pending interrupts, timers and clocks across checkpoints.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use serde_json::json;
use tardigrade_tests::baremetal::apic::{self, TimerMode};
use tardigrade_tests::baremetal::layout::SCRATCH;
use tardigrade_tests::baremetal::{Monitor, Routine, machine, machine_with_disk, monitor};
use tardigrade_tests::events::target;
use tardigrade_tests::require;

const DISK: &[&str] = &["disk0"];
/// A vector for the test's own interrupts.
const VECTOR: u8 = 0x40;

#[test]
fn an_interrupt_requested_before_a_save_is_taken_after_the_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    apic::enable(&mut guest);
    // Interrupts are off, so it stays requested.
    apic::timer(&mut guest, TimerMode::OneShot, VECTOR, 1000);
    while !apic::is_requested(&mut guest, VECTOR) {}
    vm.save("requested", DISK);
    guest.call(Routine::InterruptsOn, &[]);
    assert_eq!(guest.wait_interrupts(VECTOR, 0), 1);
    assert!(!apic::is_requested(&mut guest, VECTOR));

    vm.load("requested", DISK);
    assert_eq!(guest.interrupts(VECTOR), 0);
    assert!(apic::is_requested(&mut guest, VECTOR), "the request was lost");
    guest.call(Routine::InterruptsOn, &[]);
    assert_eq!(guest.wait_interrupts(VECTOR, 0), 1);
    vm.quit();

    let vm = spec.args(&["--loadvm", "requested"]).start();
    let mut guest = monitor(&vm);
    assert!(apic::is_requested(&mut guest, VECTOR), "the request was lost");
    guest.call(Routine::InterruptsOn, &[]);
    assert_eq!(guest.wait_interrupts(VECTOR, 0), 1);
    vm.quit();
}

/// Arms a timer that fires once and saves while it is armed; it must fire after each load.
fn fires_after_load(arm: impl Fn(&mut Monitor, Duration)) {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    apic::enable(&mut guest);
    guest.call(Routine::InterruptsOn, &[]);
    // The host may be slow: if the timer fires before the save, it gets more time.
    let mut time = Duration::from_millis(200);
    loop {
        let taken = guest.interrupts(VECTOR);
        arm(&mut guest, time);
        vm.save("armed", DISK);
        let armed = guest.interrupts(VECTOR) == taken;
        guest.wait_interrupts(VECTOR, taken);
        if armed {
            vm.load("armed", DISK);
            guest.wait_interrupts(VECTOR, taken);
            break;
        }
        time *= 2;
        assert!(time < Duration::from_secs(20), "the timer fires too early");
        vm.delete("armed", DISK);
    }
    let taken = guest.interrupts(VECTOR);
    vm.quit();
    let vm = spec.args(&["--loadvm", "armed"]).start();
    let mut guest = monitor(&vm);
    assert_eq!(guest.wait_interrupts(VECTOR, taken - 1), taken);
    vm.quit();
}

#[test]
fn an_armed_tsc_deadline_fires_after_a_load() {
    fires_after_load(|guest, time| {
        let (start, tsc) = (Instant::now(), guest.tsc());
        while start.elapsed() < Duration::from_millis(10) {}
        let ticks = u128::from(guest.tsc() - tsc) * time.as_nanos() / start.elapsed().as_nanos();
        apic::timer(guest, TimerMode::TscDeadline, VECTOR, 0);
        let deadline = guest.tsc() + u64::try_from(ticks).unwrap();
        guest.set_msr(apic::TSC_DEADLINE, deadline);
        assert_eq!(guest.msr(apic::TSC_DEADLINE), deadline);
    });
}

#[test]
fn an_armed_apic_timer_fires_after_a_load() {
    fires_after_load(|guest, time| {
        // KVM's APIC bus has cycles of 1 ns.
        let count = u32::try_from(time.as_nanos()).unwrap();
        apic::timer(guest, TimerMode::OneShot, VECTOR, count);
    });
}

#[test]
fn pit_periodic_apic_timer_and_serial_interrupts_go_on_after_a_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    let vectors = [VECTOR, VECTOR + 1, VECTOR + 2];
    apic::enable(&mut guest);
    apic::route(&mut guest, apic::PIT_PIN, vectors[0]);
    apic::route(&mut guest, apic::SERIAL_PIN, vectors[2]);
    apic::pit(&mut guest, 5966); // 200 Hz
    apic::timer(&mut guest, TimerMode::Periodic, vectors[1], 5_000_000);
    guest.port_out(0x3f9, 1);
    guest.call(Routine::InterruptsOn, &[]);
    let all_go_on = |guest: &mut Monitor| {
        for vector in vectors {
            let count = guest.interrupts(vector);
            guest.wait_interrupts(vector, count + 2);
        }
    };
    all_go_on(&mut guest);
    vm.save("ticking", DISK);
    all_go_on(&mut guest);
    vm.load("ticking", DISK);
    all_go_on(&mut guest);
    vm.quit();
    let vm = spec.args(&["--loadvm", "ticking"]).start();
    all_go_on(&mut monitor(&vm));
    vm.quit();
}

/// Where KVM keeps the guest's clock; MSR_KVM_SYSTEM_TIME_NEW.
const CLOCK: u64 = SCRATCH;
const SYSTEM_TIME: u32 = 0x4b56_4d01;

#[test]
fn kvmclock_goes_on_without_a_jump() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    guest.set_msr(SYSTEM_TIME, CLOCK | 1);
    let now = |guest: &mut Monitor| Duration::from_nanos(guest.call(Routine::Clock, &[CLOCK]));
    let before = now(&mut guest);
    assert!(!before.is_zero());
    vm.save("then", DISK);
    let after = now(&mut guest);
    assert!(after > before);
    // So much later that a clock that was not taken back shows.
    let later = after + Duration::from_millis(300);
    while now(&mut guest) < later {}

    let start = Instant::now();
    vm.load("then", DISK);
    let loaded = now(&mut guest);
    assert!(loaded >= before, "{loaded:?} after the load, {before:?} before the save");
    let most = after + start.elapsed();
    assert!(loaded <= most, "{loaded:?} after the load, {most:?} at most");
    assert!(now(&mut guest) > loaded);
    vm.quit();

    let start = Instant::now();
    let vm = spec.args(&["--loadvm", "then"]).start();
    let mut guest = monitor(&vm);
    let loaded = now(&mut guest);
    assert!(loaded >= before, "{loaded:?} in a new process, {before:?} before the save");
    let most = after + start.elapsed();
    assert!(loaded <= most, "{loaded:?} in a new process, {most:?} at most");
    vm.quit();
}

#[test]
fn kvmclock_is_set_forward_by_the_time_since_the_save_where_a_load_is_told_so() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    guest.set_msr(SYSTEM_TIME, CLOCK | 1);
    let now = |guest: &mut Monitor| Duration::from_nanos(guest.call(Routine::Clock, &[CLOCK]));
    let start = Instant::now();
    let first = now(&mut guest);
    vm.save("then", DISK);
    vm.save("other", DISK);
    let mut later = Duration::ZERO;
    // The long way, then a rewind.
    for rewinds in 0..2 {
        // So much later that a clock that was not set forward shows.
        later = now(&mut guest) + Duration::from_millis(300);
        while now(&mut guest) < later {}
        let mut arguments = target("then", DISK);
        arguments["x-clock"] = json!("host");
        vm.job_with("snapshot-load", arguments).unwrap();
        let told = vm.qmp().execute("x-query-load", json!({})).unwrap();
        assert_eq!(told["rewinds"], rewinds);
        let loaded = now(&mut guest);
        assert!(loaded >= later, "{loaded:?} after the load, {later:?} before");
        let most = first + start.elapsed();
        assert!(loaded <= most, "{loaded:?} after the load, {most:?} at most");
    }
    // Without a word it goes on from the save, also where it was set forward before.
    vm.load("then", DISK);
    let loaded = now(&mut guest);
    assert!(loaded < later, "{loaded:?} after the load");
    vm.quit();

    let vm = spec.args(&["--loadvm", "then", "--load-clock", "host"]).start();
    let loaded = now(&mut monitor(&vm));
    assert!(loaded >= later, "{loaded:?} in a new process, {later:?} before");
    let most = first + start.elapsed();
    assert!(loaded <= most, "{loaded:?} in a new process, {most:?} at most");
    vm.quit();
}

const TSC: u32 = 0x10;

/// Whether this host's KVM gives a guest a TSC of its own, or takes the host to set it and does nothing.
fn kvm_sets_the_tsc() -> bool {
    // More than the host's own is for a hundred years.
    const FAR: u64 = 1 << 62;
    let vcpu = Kvm::new().unwrap().create_vm().unwrap().create_vcpu(0).unwrap();
    let entry = |data| [kvm_msr_entry { index: TSC, data, ..Default::default() }];
    let mut msrs = Msrs::from_entries(&entry(FAR)).unwrap();
    assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 1);
    assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1);
    msrs.as_slice()[0].data >= FAR
}

#[test]
fn the_tsc_goes_back_where_kvm_sets_it_and_is_the_same_on_all_vcpus() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 2);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    apic::enable(&mut guest);
    apic::start_vcpu(&mut guest, 1);
    let before = guest.tsc();
    vm.save("then", DISK);
    // Not waiting for anything. KVM takes a TSC that is within a second of what it expects for that, see
    // docs/checkpoints.md.
    std::thread::sleep(Duration::from_secs(2));
    let later = guest.tsc();
    let check = |guest: &mut Monitor| {
        let loaded = guest.tsc();
        match kvm_sets_the_tsc() {
            true => assert!((before..later).contains(&loaded), "{before}, {later}, then {loaded}"),
            false => assert!(loaded > later, "the host's went back from {later} to {loaded}"),
        }
        let mut last = loaded;
        for _ in 0..5 {
            guest.start_on(1, Routine::ReadTsc, &[]);
            let second = guest.answer_of(1);
            let first = guest.tsc();
            assert!(last < second && second < first, "{last}, {second}, {first}");
            last = first;
        }
    };
    vm.load("then", DISK);
    check(&mut guest);
    vm.quit();
    let vm = spec.args(&["--loadvm", "then"]).start();
    check(&mut monitor(&vm));
    vm.quit();
}

#[test]
fn kvmclock_stands_still_while_the_guest_is_stopped() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    guest.set_msr(SYSTEM_TIME, CLOCK | 1);
    let mut qmp = vm.qmp();
    let start = Instant::now();
    let before = guest.call(Routine::Clock, &[CLOCK]);
    qmp.execute("stop", json!({})).unwrap();
    let stopped = Instant::now();
    while stopped.elapsed() < Duration::from_millis(100) {
        assert_eq!(vm.status(), "paused");
    }
    let stood = stopped.elapsed();
    qmp.execute("cont", json!({})).unwrap();
    let ran = Duration::from_nanos(guest.call(Routine::Clock, &[CLOCK]) - before);
    let most = start.elapsed() - stood;
    assert!(ran <= most, "{ran:?} passed for the guest, {most:?} at most");
    vm.quit();
}
