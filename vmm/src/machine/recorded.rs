//! The machine as a checkpoint records it, to be compared with the machine of a later load.

use std::path::Path;

use ::devices::virtio::block::{ErrorPolicy, OnError};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use snapshot::config::{Bus, CpuFacts, CpuidLeaf, DeviceConfig, DiskConfig, MachineConfig};

use super::devices::{VirtioSlot, map};
use super::spec::DeviceKind;
use super::{Machine, acpi};
use crate::boot::layout;
use crate::cli::values::MACHINE_TYPE;

/// Kind of ACPI's event device.
const EVENTS_KIND: &str = "acpi-events";
/// Kind of the VM generation id.
pub const GENERATION_KIND: &str = "vmgenid";

/// Describes `machine`.
pub fn describe(machine: &Machine) -> MachineConfig {
    let spec = machine.spec();
    MachineConfig {
        machine: MACHINE_TYPE.to_owned(),
        ram_bytes: spec.ram_bytes,
        vcpus: u32::from(spec.vcpus),
        cpu: cpu_facts(machine.cpuid()),
        kernel: path_text(spec.kernel.as_deref()),
        command_line: spec.cmdline.clone(),
        initrd: path_text(spec.initrd.as_deref()),
        name: spec.name.clone().unwrap_or_default(),
        uuid: if spec.uuid.is_nil() { String::new() } else { spec.uuid.hyphenated().to_string() },
        devices: describe_devices(machine),
    }
}

/// Names of the nodes that the disks of `machine` are now, in the order of their slots.
pub fn disks(machine: &Machine) -> Vec<String> {
    let disks = machine.devices().virtio().filter_map(VirtioSlot::disk);
    disks.map(|(node, _)| node.name().to_owned()).collect()
}

/// The same of a machine as it was described.
pub fn disks_of(config: &MachineConfig) -> Vec<String> {
    let disks = config.devices.iter().filter_map(|device| device.disk.as_ref());
    disks.map(|disk| disk.node.clone()).collect()
}

fn path_text(path: Option<&Path>) -> String {
    path.map(|path| path.display().to_string()).unwrap_or_default()
}

fn describe_devices(machine: &Machine) -> Vec<DeviceConfig> {
    let port = |kind: &str, address: u64, irq: Option<u32>| DeviceConfig {
        kind: kind.to_owned(),
        id: String::new(),
        bus: Bus::Pio,
        address,
        irq,
        queues: 0,
        disk: None,
    };
    let mut all = vec![
        port("serial", map::SERIAL_PORT, Some(map::SERIAL_IRQ)),
        port("i8042", map::I8042_PORT, None),
    ];
    all.extend(machine.devices().virtio().map(describe_virtio));
    if machine.spec().acpi {
        all.push(port(EVENTS_KIND, acpi::EVENTS_PORT, Some(acpi::EVENTS_IRQ)));
        // In memory: a program that does not know it finds it among the virtio devices, and refuses.
        let at = layout::GENERATION_ADDR.0;
        all.push(DeviceConfig { bus: Bus::Mmio, ..port(GENERATION_KIND, at, None) });
    }
    all
}

fn describe_virtio(slot: &VirtioSlot) -> DeviceConfig {
    let (kind, queues) = match &slot.spec.kind {
        DeviceKind::Block { queues, .. } => ("virtio-blk", *queues),
        DeviceKind::Rng => ("virtio-rng", 1),
    };
    let usual = ErrorPolicy::default();
    let policy = match &slot.spec.kind {
        DeviceKind::Block { on_error, .. } => *on_error,
        DeviceKind::Rng => usual,
    };
    DeviceConfig {
        kind: kind.to_owned(),
        id: slot.spec.id.clone().unwrap_or_default(),
        bus: Bus::Mmio,
        address: slot.address,
        irq: Some(slot.irq),
        queues,
        disk: slot.disk().map(|(node, serial)| DiskConfig {
            node: node.name().to_owned(),
            size: node.size(),
            read_only: node.read_only(),
            serial: serial.to_owned(),
            format: node.driver().to_owned(),
            filename: node.filename().to_owned(),
            share_rw: matches!(&slot.spec.kind, DeviceKind::Block { share_rw: true, .. }),
            rerror: unusual(policy.read, usual.read),
            werror: unusual(policy.write, usual.write),
        }),
    }
}

/// What is done about errors, where it is not what is done without a word.
fn unusual(policy: OnError, usual: OnError) -> String {
    if policy == usual { String::new() } else { policy.to_string() }
}

/// What leaf 0 and 1 say of the CPU, and every leaf, as the first vCPU is told.
fn cpu_facts(cpuid: &CpuId) -> CpuFacts {
    let leaves = cpuid.as_slice();
    let (family, model, stepping) = find(leaves, 1).map_or((0, 0, 0), |leaf| signature(leaf.eax));
    CpuFacts {
        vendor: find(leaves, 0).map(vendor).unwrap_or_default(),
        family,
        model,
        stepping,
        leaves: leaves.iter().map(record_leaf).collect(),
    }
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32) -> Option<&kvm_cpuid_entry2> {
    leaves.iter().find(|leaf| leaf.function == function)
}

fn vendor(leaf: &kvm_cpuid_entry2) -> String {
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Family, model and stepping of leaf 1 EAX (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E).
fn signature(eax: u32) -> (u32, u32, u32) {
    let base_family = (eax >> 8) & 0xf;
    let base_model = (eax >> 4) & 0xf;
    let family = if base_family == 0xf { base_family + ((eax >> 20) & 0xff) } else { base_family };
    let extended = matches!(base_family, 0x6 | 0xf);
    let model = if extended { base_model | (((eax >> 16) & 0xf) << 4) } else { base_model };
    (family, model, eax & 0xf)
}

fn record_leaf(leaf: &kvm_cpuid_entry2) -> CpuidLeaf {
    CpuidLeaf {
        function: leaf.function,
        index: leaf.index,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_read_with_its_extensions() {
        // Zen 4: family 0x19, model 0x11, stepping 1; Skylake: family 6, model 0x55, stepping 4.
        assert_eq!(signature(0x00a1_0f11), (0x19, 0x11, 1));
        assert_eq!(signature(0x0005_0654), (6, 0x55, 4));
    }

    #[test]
    fn the_vendor_is_in_ebx_edx_ecx() {
        let leaf = kvm_cpuid_entry2 {
            ebx: u32::from_le_bytes(*b"Genu"),
            edx: u32::from_le_bytes(*b"ineI"),
            ecx: u32::from_le_bytes(*b"ntel"),
            ..Default::default()
        };
        assert_eq!(vendor(&leaf), "GenuineIntel");
    }
}
