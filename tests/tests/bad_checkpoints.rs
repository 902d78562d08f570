//! Checkpoints that this machine must not load: of another configuration, damaged, made by QEMU.
//! Each is refused before the guest is stopped, in the job's error and at `--loadvm`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use qmp::client::Client;
use serde_json::json;
use tardigrade_tests::counter::{self, Running, snapshot};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::process::{Awaited, Watch};
use tardigrade_tests::refusal::fails;
use tardigrade_tests::require;
use tardigrade_tests::vm::VmSpec;
use tardigrade_tests::vmstate::VmState;

/// Two disks with the checkpoint "one" of a machine with 64 MiB and one vCPU; tells the count at
/// the save.
fn saved(dir: &Path) -> ([Disk; 2], u8) {
    let disks =
        [Disk::qcow2(dir.join("disk0.qcow2"), "16M"), Disk::qcow2(dir.join("disk1.qcow2"), "32M")];
    let mut vm = Running::start(&counter::spec(dir, 4 << 20).disk(&disks[0]).disk(&disks[1]));
    vm.check_alive();
    vm.done("snapshot-save", snapshot("one", &["disk0", "disk1"]));
    let count = vm.count();
    vm.check_alive();
    vm.vm.quit();
    (disks, count)
}

/// `--loadvm one` must fail with exit status 1; gives what is said on stderr.
fn loadvm_fails(spec: &VmSpec) -> String {
    let args: Vec<_> = spec.arguments().iter().map(String::as_str).collect();
    let stderr = fails(&[&args[..], &["--serial", "null", "--loadvm", "one"]].concat());
    assert!(stderr.contains("--loadvm one: "), "{stderr}");
    stderr
}

fn check(text: &str, wanted: &[&str]) {
    for part in wanted {
        assert!(text.contains(part), "'{part}' is not in '{text}'");
    }
}

/// Loads in a running machine and at the start are both refused with all of `wanted`.
fn refused(spec: &VmSpec, devices: &[&str], wanted: &[&str]) {
    let mut vm = Running::start(spec);
    let error = vm.refused("snapshot-load", snapshot("one", devices));
    check(&error, wanted);
    vm.vm.quit();
    check(&loadvm_fails(spec), wanted);
}

#[test]
fn each_difference_of_the_configuration_is_named_and_refused() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disks, count) = saved(dir.path());
    let [disk0, disk1] = &disks;
    let extra = Disk::qcow2(dir.path().join("disk2.qcow2"), "16M");
    let both = ["disk0", "disk1"];
    let machine = |ram: &str, vcpus| counter::spec_with(dir.path(), 4 << 20, ram, vcpus);
    let same = || machine("64M", 1).disk(disk0);
    let node_only = |spec: VmSpec, node: &str, disk: &Disk| {
        let file = disk.file();
        let options =
            format!("driver=qcow2,node-name={node},file.driver=file,file.filename={file}");
        spec.args(&["--blockdev", &options])
    };

    let reserialled = |spec: VmSpec| {
        let device = "virtio-blk-device,drive=disk1,serial=other";
        node_only(spec, "disk1", disk1).args(&["--device", device])
    };

    let ram = "RAM: the checkpoint has 64 MiB, this machine 128 MiB";
    let vcpus = "vCPUs: the checkpoint has 1, this machine 2";
    let serial = "serial: the checkpoint has 'disk1', this machine 'other'";
    refused(&machine("128M", 1).disk(disk0).disk(disk1), &both, &[ram]);
    refused(&machine("64M", 2).disk(disk0).disk(disk1), &both, &[vcpus]);
    refused(&reserialled(same()), &both, &["'disk1'", serial]);
    // All of them at once, each named.
    let all = reserialled(machine("128M", 2).disk(disk0));
    refused(&all, &both, &["Snapshot 'one' is of another configuration: ", ram, vcpus, serial]);
    let queues = "number of queues: the checkpoint has 1, this machine 3";
    refused(&same().disk_with(disk1, "", ",num-queues=3"), &both, &["'disk1'", queues]);
    let rng = same().disk(disk1).args(&["--device", "virtio-rng-device"]);
    refused(&rng, &both, &["virtio-rng", "this machine has it, the checkpoint does not"]);
    // A disk under another name is another disk.
    let renamed =
        node_only(same(), "blue", disk1).args(&["--device", "virtio-blk-device,drive=blue"]);
    refused(
        &renamed,
        &["disk0", "blue"],
        &["'disk1' belongs to it and is not given", "'blue' does not belong to it"],
    );

    // A disk fewer: not attached, though its node is there; or not named in the job.
    let detached = node_only(same(), "disk1", disk1);
    let mut vm = Running::start(&detached);
    let error = vm.refused("snapshot-load", snapshot("one", &both));
    check(&error, &["virtio-blk 'disk1'", "the checkpoint has it, this machine does not"]);
    let error = vm.refused("snapshot-load", snapshot("one", &["disk0"]));
    check(&error, &["Snapshot 'one' is of other disks: 'disk1' belongs to it and is not given"]);
    vm.vm.quit();
    check(&loadvm_fails(&same()), &["'disk1' belongs to it and is not given"]);

    // A disk more: without the tag, and with one of another save.
    let three = same().disk(disk1).disk(&extra);
    let mut vm = Running::start(&three);
    let error = vm.refused("snapshot-load", snapshot("one", &["disk0", "disk1", "disk2"]));
    check(&error, &["Snapshot 'one' does not exist in one or more devices", "'disk2'"]);
    let error = vm.refused("snapshot-load", snapshot("one", &both));
    check(&error, &["'disk2'", "this machine has it, the checkpoint does not"]);
    vm.vm.quit();
    check(&loadvm_fails(&three), &["does not exist in one or more devices", "'disk2'"]);
    qemu_img(&["snapshot", "-c", "one", &extra.file()]);
    refused(
        &three,
        &["disk0", "disk1", "disk2"],
        &["Snapshot 'one' on 'disk2' was not taken together with the one on 'disk0'"],
    );

    // Another size of a disk that stays as it is. One that goes back gets the size it had.
    qemu_img(&["resize", "-q", &disk1.file(), "48M"]);
    let shown = disk1.info()["virtual-size"].as_u64();
    assert_eq!(shown, Some(48 << 20));

    // None of that has changed the checkpoint.
    let mut vm = Running::start(&same().disk(disk1));
    vm.done("snapshot-load", snapshot("one", &both));
    vm.expect_count(count);
    vm.vm.quit();
    assert_eq!(disk1.info()["virtual-size"].as_u64(), Some(32 << 20));
    disks.iter().for_each(Disk::check);
}

/// A disk with the checkpoint "one", with its VM state at hand.
struct Damaged {
    disk: Disk,
    spec: VmSpec,
    state: VmState,
}

impl Damaged {
    fn new(dir: &Path) -> Self {
        let disk = Disk::qcow2(dir.join("disk0.qcow2"), "16M");
        let spec = counter::spec(dir, 4 << 20).disk(&disk);
        let mut vm = Running::start(&spec);
        vm.done("snapshot-save", snapshot("one", &["disk0"]));
        vm.vm.quit();
        let state = VmState::open(&disk.path);
        Self { disk, spec, state }
    }

    /// The checkpoint is refused: at the start, and by a running machine. The image stays as it is.
    fn refused(&self, wanted: &[&str]) {
        let before = fs::read(&self.disk.path).unwrap();
        check(&loadvm_fails(&self.spec), wanted);
        let mut vm = Running::start(&self.spec);
        let error = vm.refused("snapshot-load", snapshot("one", &["disk0"]));
        check(&error, &["Snapshot 'one' on 'disk0': "]);
        check(&error, wanted);
        // The damage is that of one checkpoint, and of no use to anything else.
        vm.done("snapshot-save", snapshot("two", &["disk0"]));
        let count = vm.count();
        vm.check_alive();
        vm.done("snapshot-load", snapshot("two", &["disk0"]));
        vm.expect_count(count);
        vm.vm.quit();
        fs::write(&self.disk.path, before).unwrap();
    }

    fn loads(&self) {
        let spec = self.spec.clone().args(&["--loadvm", "one"]);
        Running::start(&spec).vm.quit();
    }
}

#[test]
fn a_damaged_header_is_refused_by_what_is_wrong_with_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    let state = &damaged.state;
    let replaced = |offset: u64, bytes: &[u8], sealed: bool, wanted: &[&str]| {
        let header = state.read(0, 64);
        state.write(offset, bytes);
        if sealed {
            state.seal();
        }
        damaged.refused(wanted);
        state.write(0, &header);
    };
    replaced(0, b"NONSENSE", false, &["the VM state is of an unknown format"]);
    replaced(0, b"QEVM", false, &["the VM state was made by QEMU; only QEMU can load it"]);
    replaced(8, &[99], false, &["the VM state has format version 99"]);
    // Any other byte, by the checksum.
    replaced(20, &[0xff], false, &["the VM-state header is damaged: "]);
    replaced(50, &[1], true, &["the VM-state header is damaged: "]);
    // Counts and lengths that claim more than there is.
    replaced(32, &u32::MAX.to_le_bytes(), false, &["the VM-state header is damaged: "]);
    replaced(36, &u32::MAX.to_le_bytes(), false, &["the VM-state header is damaged: "]);
    replaced(12, &u32::MAX.to_le_bytes(), false, &["the VM-state header is damaged: "]);
    replaced(16, &u64::MAX.to_le_bytes(), true, &["the VM state is truncated: "]);
    damaged.loads();
}

#[test]
fn a_damaged_section_is_refused_by_its_name() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    let state = &damaged.state;
    let sections = state.sections();
    let names: Vec<_> = sections.iter().map(|section| section.name.as_str()).collect();
    for kind in ["config.0", "vcpu.0", "irqchip.0", "clock.0"] {
        assert!(names.contains(&kind), "no section {kind} in {names:?}");
    }
    for (index, section) in sections.iter().enumerate() {
        let at = section.offset + (section.length - 1) * index as u64 / sections.len() as u64;
        state.flip(at);
        damaged.refused(&[&format!("VM-state section '{}' is damaged: ", section.name)]);
        state.flip(at);
    }
    damaged.loads();

    let vcpu = sections.iter().find(|section| section.name == "vcpu.0").unwrap();
    let entry = state.read(vcpu.entry, 80);
    let clock = sections.iter().find(|section| section.name == "clock.0").unwrap();
    let replaced = |offset: u64, bytes: &[u8], wanted: &[&str]| {
        state.write(vcpu.entry + offset, bytes);
        state.seal();
        damaged.refused(wanted);
        state.write(vcpu.entry, &entry);
        state.seal();
    };
    // A table that is whole in itself, with sections that are wrong.
    replaced(0, b"vcpx", &["VM-state section 'vcpu.0' is missing"]);
    replaced(48, &[7], &["VM-state section 'vcpu.0' is missing"]);
    replaced(52, &[99], &["VM-state section 'vcpu.0' has version 99"]);
    replaced(64, &u64::MAX.to_le_bytes(), &["VM-state section 'vcpu.0' is damaged: "]);
    replaced(56, &8u64.to_le_bytes(), &["VM-state section 'vcpu.0' is damaged: "]);
    replaced(0, &state.read(clock.entry, 56), &["VM-state section 'clock.0' is there twice"]);
    replaced(0, &[b'A'; 48], &["is damaged: "]);
    damaged.loads();
}

#[test]
fn a_state_that_a_device_refuses_leaves_the_disk_as_it_was() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    let (disk, state) = (&damaged.disk, &damaged.state);
    // Whole in itself, and of this machine: a status that no device can have is found when it is put in place.
    let sections = state.sections();
    let device = sections.iter().find(|section| section.name == "virtio-mmio.0").unwrap();
    let payload = state.read(device.offset, usize::try_from(device.length).unwrap());
    // CBOR: a text of six bytes, then the number 0, which becomes 16.
    let field = b"\x66status\x00";
    let at = payload.windows(field.len()).position(|bytes| bytes == field).unwrap();
    state.write(device.offset + at as u64 + 7, &[16]);
    state.seal_section(device);
    state.seal();

    let write = ["-c", "write -P 0x77 1M 64k", &disk.file()];
    assert!(Command::new("qemu-io").args(write).stdout(Stdio::null()).status().unwrap().success());
    let now = disk.read(None);
    assert!(now != disk.read(Some("one")), "the disk was not changed");
    let wanted = "device status";
    check(&loadvm_fails(&damaged.spec), &[wanted]);
    assert!(disk.read(None) == now, "--loadvm has changed the disk");
    let restore = format!("{}#one", disk.file());
    check(&fails(&["--restore", &restore, "--serial", "null"]), &[wanted]);
    assert!(disk.read(None) == now, "--restore has changed the disk");

    let mut vm = Running::start(&damaged.spec);
    let (result, _) = vm.job("snapshot-load", snapshot("one", &["disk0"]));
    check(&result.unwrap_err(), &[wanted]);
    assert_eq!(vm.vm.status(), "restore-vm");
    vm.vm.quit();
    assert!(disk.read(None) == now, "snapshot-load has changed the disk");
    disk.check();
}

#[test]
fn a_truncated_vm_state_is_refused() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    let state = &damaged.state;
    let size = state.size();
    let truncated = |shorter: u64, wanted: &[&str]| {
        state.set_size(shorter);
        damaged.refused(wanted);
        state.set_size(size);
    };
    truncated(40, &["the VM state is truncated: "]);
    truncated(1000, &["the VM state is truncated: "]);
    truncated(size - (2 << 20), &["the VM state is truncated: "]);
    truncated(size + (2 << 20), &["the VM-state header is damaged: "]);
    // Nothing where the header should be.
    let entry = state.map(0, 0);
    damaged.refused(&["the VM state is of an unknown format"]);
    state.map(0, entry);
    // RAM in clusters that cannot be.
    let ram = u64::from_le_bytes(state.read(24, 8).try_into().unwrap()) + (2 << 20);
    let whole = fs::read(&damaged.disk.path).unwrap();
    let entry = state.map(ram, (1 << 63) | (1 << 50));
    damaged.refused(&["the mapping of RAM could not be read", "is corrupt"]);
    // An entry that breaks the rules of qcow2 marks the image, as in QEMU.
    state.map(ram, (1 << 63) | 0x200);
    check(&loadvm_fails(&damaged.spec), &["the mapping of RAM could not be read", "is corrupt"]);
    fs::write(&damaged.disk.path, &whole).unwrap();
    state.map(ram, entry);
    // A file that was cut off: RAM that is gone is not zero.
    let whole = fs::read(&damaged.disk.path).unwrap();
    let file = fs::File::options().write(true).open(&damaged.disk.path).unwrap();
    file.set_len(state.host(ram)).unwrap();
    let args: Vec<_> = damaged.spec.arguments().iter().map(String::as_str).collect();
    let stderr = fails(&[&args[..], &["--serial", "null", "--loadvm", "one"]].concat());
    check(&stderr, &["is the file truncated?"]);
    fs::write(&damaged.disk.path, whole).unwrap();
    damaged.loads();
}

#[test]
fn a_vm_state_made_by_qemu_is_refused_by_name() {
    let program = "qemu-system-x86_64";
    let there = Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        eprintln!("SKIPPED: {program} is not installed");
        return;
    }
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let socket = dir.path().join("qemu.sock");
    let mut watch = Watch::new(dir.path());
    let node =
        format!("driver=qcow2,node-name=disk0,file.driver=file,file.filename={}", disk.file());
    let mut qemu = Command::new(program)
        .args(["-M", "none", "-nodefaults", "-display", "none", "-S", "-blockdev", &node, "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let patience = std::time::Duration::from_secs(60);
    assert_eq!(watch.wait(&socket, &qemu, patience), Awaited::File);
    let mut client = loop {
        match Client::connect(&socket) {
            Ok(client) => break client,
            Err(error) => assert!(qemu.try_wait().unwrap().is_none(), "{error}"),
        }
    };
    let mut arguments = snapshot("one", &["disk0"]);
    arguments["job-id"] = json!("save");
    client.run_job("snapshot-save", arguments, patience).unwrap();
    client.execute("quit", json!({})).unwrap();
    assert!(qemu.wait().unwrap().success());
    assert_eq!(disk.tags(), ["one"]);
    let wanted =
        ["Snapshot 'one' on 'disk0': the VM state was made by QEMU; only QEMU can load it"];
    refused(&counter::spec(dir.path(), 0).disk(&disk), &["disk0"], &wanted);
    disk.check();
}
