//! Bare-metal guests: the registers of vCPUs across checkpoints, the start of further vCPUs, and what ends or
//! stops a vCPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::Duration;

use serde_json::json;
use tardigrade_tests::baremetal::apic;
use tardigrade_tests::baremetal::layout::{OTHER_PML4, PML4, SCRATCH, STACKS};
use tardigrade_tests::baremetal::registers::{Level, Registers};
use tardigrade_tests::baremetal::{Monitor, Routine, machine, machine_with_disk, monitor};
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

const DISK: &[&str] = &["disk0"];

/// Registers are held at CPL 0 with this stack.
const STACK: u64 = STACKS + 0x3000;

fn save_change_load(level: Level, new_process: bool) {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    let (saved, other) = (Registers::of(2, STACK), Registers::of(1, STACK - 0x100));
    saved.hold(&mut guest, level);
    vm.save("held", DISK);
    assert_eq!(Registers::release(&mut guest), (saved.clone(), level), "after the save");

    other.hold(&mut guest, level);
    assert_eq!(Registers::release(&mut guest), (other.clone(), level), "the other values");
    other.hold(&mut guest, level);
    if new_process {
        vm.quit();
        vm = spec.args(&["--loadvm", "held"]).start();
        guest = Monitor::connect(vm.serial_path());
    } else {
        vm.load("held", DISK);
    }
    assert_eq!(Registers::release(&mut guest), (saved, level), "after the load");
    vm.quit();
}

#[test]
fn registers_of_a_guest_at_cpl_3_come_back_in_the_same_process() {
    save_change_load(Level::User, false);
}

#[test]
fn registers_of_a_guest_at_cpl_3_come_back_in_a_new_process() {
    save_change_load(Level::User, true);
}

#[test]
fn registers_of_a_guest_at_cpl_0_come_back_in_the_same_process() {
    save_change_load(Level::Kernel, false);
}

#[test]
fn registers_of_a_guest_at_cpl_0_come_back_in_a_new_process() {
    save_change_load(Level::Kernel, true);
}

/// MSRs that hold what is written: SYSENTER, PAT, STAR, LSTAR, CSTAR, FMASK, the segment bases.
const MSRS: &[(u32, u64)] = &[
    (0x174, 0x10),
    (0x175, 0x1234_5000),
    (0x176, 0x2345_6000),
    (0x277, 0x0007_0406_0007_0406),
    (0xc000_0081, 0x0023_0010_0000_0000),
    (0xc000_0082, 0x0011_2233),
    (0xc000_0083, 0x0022_3344),
    (0xc000_0084, 0x0004_7700),
    (0xc000_0100, 0x0000_1234_5678_9abc),
    (0xc000_0101, 0x0000_2345_6789_abcd),
    (0xc000_0102, 0x0000_3456_789a_bcde),
];

/// Debug registers: addresses, and a breakpoint on execution that is never reached (DR7.G0).
const DEBUG: &[(u64, u64)] =
    &[(0, 0x7777_0000), (1, 0x1111_1000), (2, 0x2222_2000), (3, 0x3333_3000), (7, 0x402)];

fn system_registers(guest: &mut Monitor) -> Vec<u64> {
    let mut values: Vec<u64> = MSRS.iter().map(|(index, _)| guest.msr(*index)).collect();
    values.extend(DEBUG.iter().map(|(index, _)| guest.call(Routine::ReadDr, &[*index])));
    values.extend([0, 2, 3, 4].map(|index| guest.call(Routine::ReadCr, &[index])));
    values
}

#[test]
fn msrs_debug_and_control_registers_come_back() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    for (index, value) in MSRS {
        guest.set_msr(*index, *value);
    }
    for (index, value) in DEBUG {
        guest.call(Routine::WriteDr, &[*index, *value]);
    }
    guest.call(Routine::WriteCr3, &[OTHER_PML4]);
    // A page fault beyond what is mapped leaves its address in CR2.
    let unmapped = 0x7f_dead_b000;
    assert_eq!(guest.try_call(Routine::Peek64, &[unmapped]).unwrap_err().vector, 14);
    let saved = system_registers(&mut guest);
    let wanted: Vec<u64> = MSRS.iter().chain(&[]).map(|(_, value)| *value).collect();
    assert_eq!(saved[..MSRS.len()], wanted, "{saved:x?}");
    assert_eq!(saved[MSRS.len() + DEBUG.len() + 1..][..2], [unmapped, OTHER_PML4]);

    vm.save("set", DISK);
    for (index, _) in MSRS.iter().filter(|(index, _)| *index != 0x277) {
        guest.set_msr(*index, 0);
    }
    guest.set_msr(0x277, 0x0606_0606_0606_0606);
    guest.call(Routine::WriteDr, &[7, 0x400]);
    for index in 0..4 {
        guest.call(Routine::WriteDr, &[index, 0]);
    }
    guest.call(Routine::WriteCr3, &[PML4]);
    assert_eq!(guest.try_call(Routine::Peek64, &[unmapped + 0x1000]).unwrap_err().vector, 14);
    let changed = system_registers(&mut guest);
    for (index, value) in changed.iter().enumerate().take(saved.len() - 1) {
        let is_cr0 = index == MSRS.len() + DEBUG.len();
        assert!(is_cr0 || *value != saved[index], "register {index} did not change");
    }

    vm.load("set", DISK);
    assert_eq!(system_registers(&mut guest), saved, "after the load");
    vm.quit();
    let vm = spec.args(&["--loadvm", "set"]).start();
    let mut guest = monitor(&vm);
    assert_eq!(system_registers(&mut guest), saved, "in a new process");
    vm.quit();
}

#[test]
fn what_a_guest_has_where_it_once_asked_for_the_time_of_day_comes_back() {
    if !require::kvm() {
        return;
    }
    const WALL_CLOCK: u32 = 0x4b56_4d00;
    const PLACE: u64 = SCRATCH + 0x3000;
    const WORDS: [u64; 2] = [0x1111_2222_3333_4444, 0x5555_6666_7777_8888];
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    guest.set_msr(WALL_CLOCK, PLACE);
    assert_ne!(guest.peek(PLACE) >> 32, 0, "KVM has not told the time");
    let put = |guest: &mut Monitor, words: [u64; 2]| {
        guest.poke(PLACE, words[0]);
        guest.poke(PLACE + 8, words[1]);
    };
    let get = |guest: &mut Monitor| [guest.peek(PLACE), guest.peek(PLACE + 8)];
    put(&mut guest, WORDS);
    vm.save("asked", DISK);
    // A rewind, then the long way.
    for mode in ["lazy", "eager"] {
        put(&mut guest, [7, 8]);
        let mut arguments = json!({ "tag": "asked", "vmstate": "disk0", "devices": DISK });
        arguments["x-mode"] = json!(mode);
        vm.job_with("snapshot-load", arguments).unwrap();
        assert_eq!(get(&mut guest), WORDS, "{mode}");
        vm.save(mode, DISK);
    }
    vm.quit();
    let vm = spec.args(&["--loadvm", "asked"]).start();
    let mut guest = monitor(&vm);
    assert_eq!(get(&mut guest), WORDS, "in a new process");
    assert_eq!(guest.msr(WALL_CLOCK), PLACE);
    vm.quit();
}

/// Words the vCPUs count in: one of their own each, a cache line apart, then one for all.
const OWN: u64 = SCRATCH + 0x1000;
const TOTAL: u64 = SCRATCH + 0x2000;
const STOP: u64 = SCRATCH + 0x2040;
const MARK: u64 = SCRATCH + 0x2080;

/// Starts all other vCPUs and lets them count.
fn start_counting(guest: &mut Monitor, vcpus: u64) {
    apic::enable(guest);
    for vcpu in 1..vcpus {
        apic::start_vcpu(guest, vcpu);
        let arguments = [Routine::CountUp as u64, OWN + 64 * vcpu, TOTAL, STOP];
        guest.start_on(vcpu, Routine::User, &arguments);
    }
    for vcpu in 1..vcpus {
        guest.wait_word(OWN + 64 * vcpu, |count| count > 1000);
    }
}

/// Stops the counting vCPUs; every count must be in its register, its word and the total.
fn stop_counting(guest: &mut Monitor, vcpus: u64) -> u64 {
    guest.poke(STOP, 1);
    let mut sum = 0;
    for vcpu in 1..vcpus {
        let count = guest.answer_of(vcpu);
        assert_ne!(count, u64::MAX, "vCPU {vcpu}: register and memory are of two moments");
        assert_eq!(guest.peek(OWN + 64 * vcpu), count);
        sum += count;
    }
    assert_eq!(guest.peek(TOTAL), sum, "counts were lost or repeated");
    sum
}

fn counters_go_on(vcpus: u8) {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", vcpus);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    start_counting(&mut guest, vcpus.into());
    guest.poke(MARK, 1);
    let before = guest.peek(TOTAL);
    vm.save("counting", DISK);
    let after = guest.wait_word(TOTAL, |total| total > before);
    guest.poke(MARK, 2);
    let stopped = stop_counting(&mut guest, vcpus.into());
    // The vCPU may not have had the host's CPU in between.
    assert!(stopped >= after);

    vm.load("counting", DISK);
    assert_eq!(guest.peek(MARK), 1, "memory is not that of the save");
    let total = guest.peek(TOTAL);
    guest.wait_word(TOTAL, |now| now > total);
    assert!(stop_counting(&mut guest, vcpus.into()) > before, "it went back behind the save");
    vm.quit();

    let vm = spec.args(&["--loadvm", "counting"]).start();
    let mut guest = monitor(&vm);
    assert_eq!(guest.peek(MARK), 1, "memory is not that of the save");
    let total = guest.peek(TOTAL);
    guest.wait_word(TOTAL, |now| now > total);
    assert!(stop_counting(&mut guest, vcpus.into()) > before, "it went back behind the save");
    vm.quit();
}

#[test]
fn two_vcpus_start_and_count_on_after_a_load() {
    counters_go_on(2);
}

#[test]
fn four_vcpus_start_and_count_on_after_a_load() {
    counters_go_on(4);
}

#[test]
fn vcpus_that_were_never_started_can_be_started_after_a_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 2);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    vm.save("waiting", DISK);
    start_counting(&mut guest, 2);
    vm.load("waiting", DISK);
    start_counting(&mut guest, 2);
    stop_counting(&mut guest, 2);
    vm.quit();
    let vm = spec.args(&["--loadvm", "waiting"]).start();
    let mut guest = monitor(&vm);
    start_counting(&mut guest, 2);
    stop_counting(&mut guest, 2);
    vm.quit();
}

fn wait_event(vm: &Vm, name: &str, act: impl FnOnce()) -> serde_json::Value {
    let mut qmp = vm.qmp();
    act();
    qmp.wait_event(Duration::from_secs(60), |event| event["event"] == name).unwrap()
}

#[test]
fn a_triple_fault_resets_the_machine() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    guest.poke(SCRATCH, 0x1234);
    let event = wait_event(&vm, "RESET", || guest.start(Routine::TripleFault, &[]));
    assert_eq!(event["data"], json!({ "guest": true, "reason": "guest-reset" }));
    assert_eq!(guest.peek(SCRATCH), 0, "memory is as before the reset");
    assert_eq!(vm.status(), "running");
    vm.quit();
}

#[test]
fn a_triple_fault_ends_the_machine_with_no_reboot() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine(dir.path(), "32M", 1).args(&["--no-reboot"]).start();
    let mut guest = monitor(&vm);
    let event = wait_event(&vm, "SHUTDOWN", || guest.start(Routine::TripleFault, &[]));
    assert_eq!(event["data"], json!({ "guest": true, "reason": "guest-reset" }));
    assert!(vm.wait().success());
}

#[test]
fn a_reset_brings_back_all_vcpus() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine(dir.path(), "32M", 2).start();
    let mut guest = monitor(&vm);
    start_counting(&mut guest, 2);
    wait_event(&vm, "RESET", || drop(vm.qmp().execute("system_reset", json!({})).unwrap()));
    guest.wait_started();
    assert_eq!(guest.peek(TOTAL), 0, "vCPU 1 still counts");
    start_counting(&mut guest, 2);
    stop_counting(&mut guest, 2);
    vm.quit();
}

#[test]
fn the_sleep_register_powers_off() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    guest.port_out(0x600, 0x14); // without SLP_EN: nothing
    guest.tsc();
    let event = wait_event(&vm, "SHUTDOWN", || guest.start(Routine::PortOut, &[0x600, 0x34]));
    assert_eq!(event["data"], json!({ "guest": true, "reason": "guest-shutdown" }));
    assert!(vm.wait().success());
}

#[test]
fn code_that_kvm_cannot_emulate_stops_the_guest_and_a_load_revives_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    guest.poke(SCRATCH, 0x1234);
    vm.save("well", DISK);
    // Nothing is there to fetch instructions from.
    wait_event(&vm, "STOP", || guest.start(Routine::Jump, &[0xe000_0000]));
    assert_eq!(vm.status(), "internal-error");
    let error = vm.qmp().execute("cont", json!({})).unwrap_err().to_string();
    assert!(error.contains("internal-error"), "{error}");
    assert!(vm.stderr().contains("rip 0xe000000"), "{}", vm.stderr());
    vm.load("well", DISK);
    vm.qmp().execute("cont", json!({})).unwrap();
    assert_eq!(vm.status(), "running");
    assert_eq!(guest.peek(SCRATCH), 0x1234);

    wait_event(&vm, "STOP", || guest.start(Routine::Jump, &[0xe000_0000]));
    vm.quit();
}
