//! A recorded machine in QMP's words.

use qmp::schema::{CheckpointDevice, CheckpointDisk, CheckpointMachine};
use snapshot::config::{Bus, CheckpointConfig, DeviceConfig, DiskConfig};

/// Describes the machine that a checkpoint records.
pub(super) fn describe(config: &CheckpointConfig) -> CheckpointMachine {
    let machine = &config.machine;
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    CheckpointMachine {
        kind: machine.machine.clone(),
        name: given(&machine.name),
        uuid: given(&machine.uuid),
        ram_bytes: machine.ram_bytes,
        vcpus: machine.vcpus.into(),
        cpu_vendor: machine.cpu.vendor.clone(),
        cpu_family: machine.cpu.family.into(),
        cpu_model: machine.cpu.model.into(),
        cpu_stepping: machine.cpu.stepping.into(),
        kernel: given(&machine.kernel),
        initrd: given(&machine.initrd),
        command_line: machine.command_line.clone(),
        directory: given(&config.about.directory),
        devices: machine.devices.iter().map(|one| device(one, config)).collect(),
    }
}

fn device(device: &DeviceConfig, config: &CheckpointConfig) -> CheckpointDevice {
    CheckpointDevice {
        model: device.kind.clone(),
        id: (!device.id.is_empty()).then(|| device.id.clone()),
        bus: match device.bus {
            Bus::Mmio => "mmio",
            Bus::Pio => "pio",
        }
        .to_owned(),
        address: device.address,
        irq: device.irq.map(i64::from),
        queues: device.queues.into(),
        disk: device.disk.as_ref().map(|one| disk(one, config)),
    }
}

fn disk(disk: &DiskConfig, config: &CheckpointConfig) -> CheckpointDisk {
    CheckpointDisk {
        node_name: disk.node.clone(),
        size: disk.size,
        read_only: disk.read_only,
        saved: config.nodes.iter().any(|node| node.node == disk.node),
        serial: disk.serial.clone(),
        format: disk.format.clone(),
        filename: disk.filename.clone(),
    }
}
