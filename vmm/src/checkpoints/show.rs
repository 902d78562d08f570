//! `snapshot show`: everything about one checkpoint.

use qmp::schema::{CheckpointDevice, CheckpointDisk, CheckpointInfo, CheckpointMachine};

use super::draw::total;
use super::text::{clock, safe, size, utc};

/// Describes a checkpoint in lines of a name and a value; ends with a newline.
pub fn checkpoint(info: &CheckpointInfo) -> String {
    let mut out = Lines::default();
    let own = &info.checkpoint;
    out.line("checkpoint", &own.tag);
    if !info.description.is_empty() {
        out.line("description", &info.description);
    }
    for label in &info.labels {
        out.line("label", &format!("{}={}", label.key, label.value));
    }
    let saved =
        format!("{} UTC, after {} of the guest's time", utc(own.date_sec), clock(own.vm_clock_sec));
    out.line("saved", &saved);
    match (&info.parent, &info.nearest) {
        (Some(parent), Some(nearest)) if parent == nearest => out.line("parent", &parent.tag),
        (Some(parent), Some(nearest)) => {
            out.line("parent", &format!("{}, deleted; before it {}", parent.tag, nearest.tag));
        }
        (Some(parent), None) => out.line("parent", &format!("{}, which is not here", parent.tag)),
        (None, _) => out.line("parent", "none"),
    }
    sizes(info, &mut out);
    if let Some(problem) = &info.problem {
        out.line("problem", problem);
    }
    match &info.machine {
        Some(machine) => describe(machine, info, &mut out),
        None if info.vmstate.is_none() => out.line("machine", "none: a snapshot of disks only"),
        None => {}
    }
    out.0
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn line(&mut self, name: &str, value: &str) {
        let line = format!("{:<13} {}", format!("{name}:"), safe(value));
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }
}

fn sizes(info: &CheckpointInfo, out: &mut Lines) {
    if let Some(share) = total(&info.places) {
        out.line("size", &format!("{} alone, {} shared", size(share.alone), size(share.shared)));
    }
    for place in &info.places {
        let mut text = format!("{} as snapshot {}", place.node_name, place.id);
        if let (Some(disk), Some(state)) = (&place.disk, &place.vm_state) {
            text.push_str(&format!(
                ": disk {} alone, {} shared",
                size(disk.alone),
                size(disk.shared)
            ));
            if info.vmstate.as_ref() == Some(&place.node_name) {
                text.push_str(&format!(
                    "; RAM and devices {} alone, {} shared",
                    size(state.alone),
                    size(state.shared)
                ));
            }
        }
        out.line("on", &text);
    }
}

fn describe(machine: &CheckpointMachine, info: &CheckpointInfo, out: &mut Lines) {
    let plural = if machine.vcpus == 1 { "" } else { "s" };
    out.line(
        "machine",
        &format!(
            "{}, {} of RAM, {} vCPU{plural}",
            machine.kind,
            size(machine.ram_bytes),
            machine.vcpus
        ),
    );
    out.line(
        "CPU",
        &format!(
            "{} family {}, model {}, stepping {}",
            machine.cpu_vendor, machine.cpu_family, machine.cpu_model, machine.cpu_stepping
        ),
    );
    let optional = [
        ("name", &machine.name),
        ("UUID", &machine.uuid),
        ("kernel", &machine.kernel),
        ("initrd", &machine.initrd),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            out.line(name, value);
        }
    }
    if !machine.command_line.is_empty() {
        out.line("command line", &machine.command_line);
    }
    if let Some(directory) = &machine.directory {
        out.line("directory", directory);
    }
    for device in &machine.devices {
        out.line("device", &device_text(device));
        if let Some(disk) = &device.disk {
            out.line("  disk", &disk_text(disk, info));
        }
    }
}

fn device_text(device: &CheckpointDevice) -> String {
    let id = device.id.as_ref().map(|id| format!(" '{id}'")).unwrap_or_default();
    let port = if device.bus == "pio" { "port " } else { "" };
    let irq = device.irq.map(|irq| format!(", interrupt {irq}")).unwrap_or_default();
    let queues =
        if device.queues > 1 { format!(", {} queues", device.queues) } else { String::new() };
    format!("{}{id} at {port}{:#x}{irq}{queues}", device.model, device.address)
}

fn disk_text(disk: &CheckpointDisk, info: &CheckpointInfo) -> String {
    let access = if disk.read_only { "read-only" } else { "writable" };
    let serial =
        if disk.serial.is_empty() { String::new() } else { format!(", serial '{}'", disk.serial) };
    let saved = if info.vmstate.as_ref() == Some(&disk.node_name) {
        ", with RAM and devices"
    } else if disk.saved {
        ""
    } else {
        ", not in the checkpoint"
    };
    format!(
        "{}: {} {} {access}{serial}, {}{saved}",
        disk.node_name,
        disk.format,
        size(disk.size),
        disk.filename
    )
}
