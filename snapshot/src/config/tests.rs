//! Each rule of the comparison, and its words.

use std::collections::BTreeMap;

use super::*;
use crate::about::Stamp;
use crate::format::section::SectionName;

fn disk(node: &str) -> DiskConfig {
    DiskConfig {
        node: node.to_owned(),
        size: 1 << 30,
        read_only: false,
        serial: "S0".to_owned(),
        format: "qcow2".to_owned(),
        filename: "root.qcow2".to_owned(),
        share_rw: false,
        rerror: String::new(),
        werror: String::new(),
    }
}

fn device(node: &str, address: u64) -> DeviceConfig {
    DeviceConfig {
        kind: "virtio-blk".to_owned(),
        id: String::new(),
        bus: Bus::Mmio,
        address,
        irq: Some(5),
        queues: 1,
        disk: Some(disk(node)),
    }
}

fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> CpuidLeaf {
    CpuidLeaf { function, index, ebx, ecx, ..CpuidLeaf::default() }
}

fn machine() -> MachineConfig {
    MachineConfig {
        machine: "microvm".to_owned(),
        ram_bytes: 256 << 20,
        vcpus: 2,
        cpu: CpuFacts {
            vendor: "GenuineIntel".to_owned(),
            family: 6,
            model: 85,
            stepping: 7,
            leaves: vec![leaf(1, 0, 0, 1 << 28), leaf(7, 0, 1 << 5, 0)],
        },
        kernel: "vmlinux".to_owned(),
        command_line: "console=ttyS0".to_owned(),
        initrd: String::new(),
        name: String::new(),
        uuid: String::new(),
        devices: vec![device("disk0", 0xd000_0000), device("disk1", 0xd000_1000)],
    }
}

/// What differs when `change` is made to a machine; the saved one is unchanged.
fn differing(change: impl FnOnce(&mut MachineConfig)) -> Vec<(String, bool)> {
    let mut here = machine();
    change(&mut here);
    let differences = here.differences(&machine());
    differences.iter().map(|d| (d.to_string(), d.is_blocking())).collect()
}

#[test]
fn a_stream_has_its_disks_by_place_and_an_image_by_name() {
    let mut here = machine();
    here.devices[0].disk.as_mut().unwrap().node = "other".to_owned();
    assert!(here.differences(&machine())[0].is_blocking());
    assert_eq!(here.differences_from_stream(&machine()), []);
    here.devices[0].disk.as_mut().unwrap().size += 512;
    here.devices.pop();
    assert_eq!(here.differences_from_stream(&machine()).len(), 2);
}

fn refused(text: &str) -> Vec<(String, bool)> {
    vec![(text.to_owned(), true)]
}

#[test]
fn equal_machines_do_not_differ() {
    assert_eq!(differing(|_| ()), []);
}

#[test]
fn machine_ram_and_vcpus_are_named_with_both_values() {
    assert_eq!(
        differing(|m| m.ram_bytes = 512 << 20),
        refused("RAM: the checkpoint has 256 MiB, this machine 512 MiB")
    );
    assert_eq!(differing(|m| m.vcpus = 1), refused("vCPUs: the checkpoint has 2, this machine 1"));
    assert_eq!(
        differing(|m| m.machine = "q35".to_owned()),
        refused("machine type: the checkpoint has 'microvm', this machine 'q35'")
    );
}

#[test]
fn kernel_command_line_file_name_and_cpu_model_do_not_block() {
    let notes = differing(|m| {
        m.kernel = "other".to_owned();
        m.command_line = String::new();
        m.cpu.model = 1;
        if let Some(disk) = &mut m.devices[0].disk {
            disk.filename = "copy.qcow2".to_owned();
        }
    });
    assert_eq!(notes.len(), 4);
    assert!(notes.iter().all(|(_, blocking)| !blocking), "{notes:?}");
}

#[test]
fn a_missing_cpu_feature_blocks_and_is_named() {
    assert_eq!(
        differing(|m| m.cpu.leaves[1].ebx = 0),
        refused(
            "CPU features: the checkpoint's guest was told of avx2 (CPUID 0x7.0 EBX, bits 0x20), \
             which this machine does not offer"
        )
    );
    // A leaf that is not there offers nothing.
    let without = differing(|m| m.cpu.leaves.clear());
    assert_eq!(without.len(), 2);
    assert!(without.iter().all(|(_, blocking)| *blocking));
}

#[test]
fn additional_and_dynamic_cpu_features_do_not_differ() {
    assert_eq!(differing(|m| m.cpu.leaves[1].ebx |= 1 << 16), []);
    let mut saved = machine();
    saved.cpu.leaves[0].ecx |= 1 << 27;
    assert_eq!(machine().differences(&saved), []);
}

#[test]
fn another_cpu_vendor_blocks() {
    assert_eq!(
        differing(|m| m.cpu.vendor = "AuthenticAMD".to_owned()),
        refused("CPU vendor: the checkpoint has 'GenuineIntel', this machine 'AuthenticAMD'")
    );
}

#[test]
fn missing_and_extra_devices_are_named() {
    assert_eq!(
        differing(|m| drop(m.devices.pop())),
        refused(
            "device virtio-blk 'disk1' at 0xd0001000: the checkpoint has it, this machine does not"
        )
    );
    assert_eq!(
        differing(|m| m.devices.push(device("disk2", 0xd000_2000))),
        refused(
            "device virtio-blk 'disk2' at 0xd0002000: this machine has it, the checkpoint does not"
        )
    );
}

#[test]
fn each_device_property_that_the_guest_sees_blocks() {
    let first = |change: fn(&mut DeviceConfig)| differing(|m| change(&mut m.devices[0]));
    let name = "device virtio-blk 'disk0' at 0xd0000000";
    assert_eq!(
        first(|d| d.kind = "virtio-rng".to_owned()),
        refused(
            "device at 0xd0000000: the checkpoint has virtio-blk 'disk0' at 0xd0000000, \
             this machine virtio-rng 'disk0' at 0xd0000000"
        )
    );
    assert_eq!(
        first(|d| d.irq = None),
        refused(&format!("{name}, interrupt: the checkpoint has 5, this machine none"))
    );
    assert_eq!(
        first(|d| d.queues = 4),
        refused(&format!("{name}, number of queues: the checkpoint has 1, this machine 4"))
    );
    assert_eq!(
        first(|d| d.disk = None),
        refused(&format!("{name}, disk: the checkpoint has a disk, this machine no disk"))
    );
    let of_disk =
        |change: fn(&mut DiskConfig)| differing(|m| m.devices[0].disk.iter_mut().for_each(change));
    assert_eq!(
        of_disk(|d| d.node = "root".to_owned()),
        refused(&format!("{name}, node: the checkpoint has 'disk0', this machine 'root'"))
    );
    assert_eq!(
        of_disk(|d| d.size = 2 << 30),
        refused(&format!("{name}, disk size: the checkpoint has 1 GiB, this machine 2 GiB"))
    );
    assert_eq!(
        of_disk(|d| d.read_only = true),
        refused(&format!("{name}, access: the checkpoint has writable, this machine read-only"))
    );
    assert_eq!(
        of_disk(|d| d.serial.clear()),
        refused(&format!("{name}, serial: the checkpoint has 'S0', this machine ''"))
    );
}

fn checkpoint(machine: MachineConfig, about: About) -> CheckpointConfig {
    let nodes = vec![CheckpointNode { node: "disk0".to_owned(), size: 1 << 30 }];
    CheckpointConfig { machine, nodes, about }
}

#[test]
fn disks_of_the_checkpoint_may_have_another_size_now_and_others_may_not() {
    let saved = checkpoint(machine(), About::default());
    let mut here = machine();
    here.devices[0].disk.as_mut().unwrap().size = 2 << 30;
    assert_eq!(saved.differences(&here), []);
    here.devices[1].disk.as_mut().unwrap().size = 2 << 30;
    let differences = saved.differences(&here);
    assert_eq!(differences.len(), 1);
    assert!(differences[0].is_blocking());
    assert!(differences[0].to_string().contains("'disk1' at 0xd0001000, disk size"));
}

fn golden(version: u32, bytes: &[u8]) -> Section {
    let name = SectionName::new(CONFIG_KIND, 0);
    Section { name, version, bytes: bytes.to_vec() }
}

#[test]
fn golden_version_1_payload_decodes_with_nothing_said_of_ancestors() {
    let bytes = include_bytes!("../../tests/golden/config-v1.cbor");
    let config = decode_config(&[golden(1, bytes)]).unwrap();
    assert_eq!(config, checkpoint(machine(), About::default()));
}

#[test]
fn golden_version_2_payload_decodes_and_encodes_to_the_same_bytes() {
    let bytes = include_bytes!("../../tests/golden/config-v2.cbor");
    let stamp = |tag: &str, date_sec| Stamp {
        tag: tag.to_owned(),
        date_sec,
        date_nsec: 5_000,
        vm_clock_nsec: 77,
    };
    let about = About {
        description: "before the upgrade".to_owned(),
        labels: BTreeMap::from([("job".to_owned(), "17".to_owned())]),
        ancestors: vec![stamp("parent", 1_700_000_001), stamp("root", 1_700_000_000)],
        vmstate: "disk0".to_owned(),
        directory: "/srv/vm".to_owned(),
    };
    let mut machine = machine();
    machine.initrd = "initrd".to_owned();
    machine.name = "water bear".to_owned();
    machine.uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8".to_owned();
    if let Some(disk) = &mut machine.devices[1].disk {
        disk.share_rw = true;
    }
    let config = checkpoint(machine, about);
    let section = Section::encode(CONFIG_KIND, 0, CONFIG_VERSION, &config).unwrap();
    assert_eq!(section, golden(2, bytes));
    assert_eq!(decode_config(&[section]).unwrap(), config);
    assert!(decode_config(&[golden(3, bytes)]).is_err(), "a version of the future");
}
