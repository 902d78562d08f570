//! `--machine microvm,acpi=on`: tables that a guest finds, and an id that tells it that it was revived.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use tardigrade_tests::baremetal::{Monitor, Routine, apic, machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec, binary};

const DISK: &[&str] = &["disk0"];
/// Where guests search for the RSDP (ACPI 6.5, 5.2.5.1).
const BIOS: u64 = 0xe_0000;
const BIOS_LEN: usize = 0x2_0000;
/// The zero page's `acpi_rsdp_addr`.
const RSDP_ADDR: u64 = 0x7000 + 0x70;
/// The event device.
const EVENTS_PORT: u16 = 0x608;
const EVENTS_PIN: u8 = 3;
/// The VM generation id (`docs/acpi.md`).
const ID: u64 = 0xe_f000;
const VECTOR: u8 = 0x41;

fn acpi_machine(dir: &Path) -> VmSpec {
    machine_with_disk(dir, "64M", 2).args(&["--machine", "microvm,acpi=on"])
}

fn disk(dir: &Path) -> Disk {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A table by its address, whole and with a right checksum.
fn table(guest: &mut Monitor, address: u64, signature: &str) -> Vec<u8> {
    let header = guest.bytes(address, 36);
    assert_eq!(&header[..4], signature.as_bytes());
    let table = guest.bytes(address, usize::try_from(number(&header[4..8])).unwrap());
    assert_eq!(sum(&table), 0, "checksum of {signature}");
    table
}

/// The RSDP, found as a guest finds it.
fn rsdp(guest: &mut Monitor) -> Option<(u64, Vec<u8>)> {
    let bios = guest.bytes(BIOS, BIOS_LEN);
    let at = bios.chunks(16).position(|line| line.starts_with(b"RSD PTR "))? * 16;
    Some((BIOS + at as u64, bios[at..at + 36].to_vec()))
}

/// The DSDT, by way of all tables above it.
fn dsdt(guest: &mut Monitor) -> Vec<u8> {
    let (address, rsdp) = rsdp(guest).expect("there is no RSDP");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    assert_eq!(guest.peek(RSDP_ADDR), address);
    let xsdt = table(guest, number(&rsdp[24..32]), "XSDT");
    let entries: Vec<_> = xsdt[36..].chunks(8).map(number).collect();
    let fadt = table(guest, entries[0], "FACP");
    let madt = table(guest, entries[1], "APIC");
    assert_eq!(madt[44..].chunks(8).take(2).map(|cpu| cpu[3]).collect::<Vec<_>>(), [0, 1]);
    table(guest, number(&fadt[140..148]), "DSDT")
}

/// Where the DSDT says that the id is: `Name (ADDR, Package (2) { low, high })`, in AML.
fn id_address(dsdt: &[u8]) -> u64 {
    let name = b"\x08ADDR\x12";
    let at = dsdt.windows(name.len()).position(|code| code == name).unwrap() + name.len();
    // One byte of length, two elements; a double word, then zero.
    let [_, 2, 0x0c, low @ .., 0] = &dsdt[at..at + 8] else {
        panic!("{:x?}", &dsdt[at..at + 8]);
    };
    number(low)
}

/// The id as the guest has it.
fn id(guest: &mut Monitor) -> String {
    let bytes = guest.bytes(ID, 16);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let swapped = |bytes: &[u8]| hex(&bytes.iter().rev().copied().collect::<Vec<_>>());
    let (a, b, c) = (swapped(&bytes[..4]), swapped(&bytes[4..6]), swapped(&bytes[6..8]));
    format!("{a}-{b}-{c}-{}-{}", hex(&bytes[8..10]), hex(&bytes[10..]))
}

/// The id as QMP tells it.
fn told(vm: &Vm) -> String {
    let answer = vm.qmp().execute("query-vm-generation-id", json!({})).unwrap();
    answer["guid"].as_str().unwrap().to_owned()
}

/// What the event device's register has; reading empties it.
fn events(guest: &mut Monitor) -> u64 {
    guest.call(Routine::PortIn, &[EVENTS_PORT.into()])
}

fn listen(guest: &mut Monitor) {
    apic::enable(guest);
    apic::route(guest, EVENTS_PIN, VECTOR);
    guest.call(Routine::InterruptsOn, &[]);
}

/// The guest was revived since it listened last: an interrupt, and event 0, once.
fn assert_told(guest: &mut Monitor) {
    guest.wait_interrupts(VECTOR, 0);
    assert_eq!((events(guest), events(guest)), (1, 0));
}

#[test]
fn a_guest_finds_its_devices_in_tables_and_not_on_its_command_line() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = acpi_machine(dir.path()).args(&["--append", "quiet"]).start();
    let mut guest = monitor(&vm);
    let dsdt = dsdt(&mut guest);
    assert!(dsdt.windows(8).any(|text| text == b"LNRO0005"));
    assert_eq!(id_address(&dsdt), ID);
    assert_eq!(id(&mut guest), told(&vm));
    assert_eq!(guest.bytes(0x2_0000, 6), b"quiet\0");
    // A guest without ACPI has its MP table all the same.
    assert_eq!(guest.bytes(0x9_fc00, 4), b"_MP_");
    vm.quit();

    let vm = machine_with_disk(dir.path(), "64M", 2).start();
    let mut guest = monitor(&vm);
    assert_eq!(rsdp(&mut guest), None);
    assert_eq!(guest.peek(RSDP_ADDR), 0);
    assert!(guest.bytes(0x2_0000, 19).starts_with(b"virtio_mmio.device="));
    let error = vm.qmp().execute("query-vm-generation-id", json!({})).unwrap_err();
    assert!(error.to_string().contains("VM Generation ID device not found"), "{error}");
    vm.quit();
}

#[test]
fn the_id_changes_with_every_load_and_with_nothing_else() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = acpi_machine(dir.path()).start();
    let mut guest = monitor(&vm);
    listen(&mut guest);
    let mut seen = HashSet::from([id(&mut guest)]);
    vm.save("one", DISK);
    vm.qmp().execute("stop", json!({})).unwrap();
    vm.qmp().execute("cont", json!({})).unwrap();
    assert!(seen.contains(&id(&mut guest)));
    assert_eq!((guest.interrupts(VECTOR), events(&mut guest)), (0, 0));

    // The second and third are rewinds, the first may be one: it is the checkpoint just saved.
    for _ in 0..3 {
        vm.load("one", DISK);
        let now = id(&mut guest);
        assert_eq!(now, told(&vm));
        assert!(seen.insert(now), "a load left the id as it was");
        assert_told(&mut guest);
    }
    let load = vm.qmp().execute("x-query-load", json!({})).unwrap();
    assert!(load["rewinds"].as_u64().unwrap() >= 2, "{load}");

    // An event that is not read yet is saved, and told once.
    vm.load("one", DISK);
    vm.save("unread", DISK);
    seen.insert(id(&mut guest));
    assert_told(&mut guest);
    vm.load("unread", DISK);
    assert!(seen.insert(id(&mut guest)));
    assert_told(&mut guest);

    // A checkpoint that does not exist, and a reset.
    let before = id(&mut guest);
    vm.job("snapshot-load", "none", DISK).unwrap_err();
    assert_eq!(id(&mut guest), before);
    assert_eq!(events(&mut guest), 0);
    vm.qmp().execute("system_reset", json!({})).unwrap();
    guest.wait_started();
    assert_eq!(id(&mut guest), before);
    assert_eq!(events(&mut guest), 0);
    assert_eq!(id_address(&dsdt(&mut guest)), ID);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn every_fork_and_every_revived_machine_has_an_id_of_its_own_and_is_told() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = acpi_machine(dir.path());
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    listen(&mut guest);
    let mut seen = HashSet::from([id(&mut guest)]);
    vm.save("base", DISK);
    vm.quit();
    let checkpoint = format!("{}#base", disk(dir.path()).file());
    let fork = VmSpec::bare().args(&["--fork", &checkpoint]);
    let revived = [
        fork.clone(),
        fork.clone().args(&["-S"]),
        VmSpec::bare().args(&["--restore", &checkpoint]),
        spec.clone().args(&["--loadvm", "base"]),
        spec.args(&["--loadvm", "base", "--load-mode", "eager"]),
    ];
    for spec in revived {
        let vm = spec.start();
        if vm.status() != "running" {
            vm.qmp().execute("cont", json!({})).unwrap();
        }
        let mut guest = monitor(&vm);
        let now = id(&mut guest);
        assert_eq!(now, told(&vm));
        assert!(seen.insert(now), "an id is there twice");
        assert_told(&mut guest);
        vm.quit();
    }
    disk(dir.path()).check();
}

#[test]
fn a_checkpoint_of_a_machine_with_acpi_is_refused_by_one_without() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = acpi_machine(dir.path()).start();
    vm.save("with", DISK);
    vm.quit();
    let disk = disk(dir.path());
    let plain = machine(dir.path(), &disk);
    let (status, error) = plain.clone().args(&["--loadvm", "with"]).run();
    assert_eq!(status.code(), Some(1));
    for device in ["acpi-events at port 0x608", "vmgenid at 0xef000"] {
        let wanted = format!("device {device}: the checkpoint has it, this machine does not");
        assert!(error.contains(&wanted), "{error}");
    }
    let mut vm = plain.start();
    vm.save("without", DISK);
    vm.quit();
    let with = plain.args(&["--machine", "microvm,acpi=on", "--loadvm", "without"]);
    let (status, error) = with.run();
    assert_eq!(status.code(), Some(1));
    let wanted = "vmgenid at 0xef000: this machine has it, the checkpoint does not";
    assert!(error.contains(wanted), "{error}");
    let restore = format!("{}#with", disk.file());
    let output = Command::new(binary())
        .args(["--restore", &restore, "--machine", "microvm,acpi=on"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("from the checkpoint"), "{error}");
    disk.check();
}

/// The same machine with the disk that is there, without ACPI.
fn machine(dir: &Path, disk: &Disk) -> VmSpec {
    tardigrade_tests::baremetal::machine(dir, "64M", 2).disk(disk)
}
