//! `--restore IMAGE#TAG`: a machine made of what a checkpoint records of it.
//!
//! The image with the VM state is opened for a look, read-only, and closed again. Its checkpoint names
//! RAM, vCPUs, devices and disks; from then on everything is as with the options that the machine was
//! once started with, and `--loadvm TAG`.
//!
//! The files of the other disks are found from where they were beside the image, so that images can
//! be moved and copied together. A load changes writable disks: the file that a moved image's record
//! names elsewhere may still be in use there, and is not taken.

use std::path::{Path, PathBuf};

use block::graph::text;
use devices::virtio::block::{ErrorPolicy, UnknownOnError};
use serde_json::{Value, json};
use snapshot::config::{Bus, CheckpointConfig, DeviceConfig, DiskConfig};
use snapshot::tree::read_config;
use snapshot::{FormatError, Stamp};
use uuid::Uuid;

use crate::cli::values::{MACHINE_TYPE, MAX_VCPUS};
use crate::image;
use crate::machine::recorded::GENERATION_KIND;
use crate::machine::spec::{DeviceKind, DeviceSpec, MachineSpec};

/// Which checkpoint to revive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreSpec {
    /// The image with the VM state.
    pub image: PathBuf,
    /// The checkpoint's tag.
    pub tag: String,
}

/// Why a checkpoint cannot be revived from its image alone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image cannot be opened.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// It has no such checkpoint.
    #[error("the image has no checkpoint '{tag}'; {}", there_are(.others))]
    NotFound {
        /// The tag.
        tag: String,
        /// The tags there are.
        others: Vec<String>,
    },
    /// It has no VM state.
    #[error(
        "'{0}' is a snapshot of the disk only; if it is part of a checkpoint, name the image with RAM and devices"
    )]
    DiskOnly(String),
    /// The VM state cannot be used.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The record has something that this program does not know.
    #[error("the checkpoint is of {0}, which this program does not have")]
    Unknown(String),
    /// It cannot be told which disk the image is.
    #[error(
        "the checkpoint does not record which of its disks ({0}) the image is: name each with --blockdev node-name=..."
    )]
    WhichDisk(String),
    /// Disks are missing.
    #[error("{}", .0.join("; "))]
    Disks(Vec<String>),
}

fn there_are(tags: &[String]) -> String {
    match tags {
        [] => "it has none at all".to_owned(),
        tags => format!("there are: {}", tags.join(", ")),
    }
}

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The machine goes on: its disks are taken back and written to.
    Restore,
    /// The images are only read, so any file that is the right one will do.
    Fork,
}

/// A machine to be revived.
#[derive(Debug)]
pub struct Plan {
    /// The machine.
    pub machine: MachineSpec,
    /// Block nodes to open besides those given on the command line.
    pub blockdevs: Vec<Value>,
    /// The checkpoint.
    pub stamp: Stamp,
    /// The nodes of the checkpoint.
    pub nodes: Vec<String>,
    /// The one with the VM state.
    pub vmstate: String,
}

/// Reads what the checkpoint records and makes a plan of it. What `given` has already (kernel, name,
/// UUID) stays; `blockdevs` are the options of nodes that the user gives.
///
/// # Errors
/// Everything that is missing is named.
pub fn plan(
    restore: &RestoreSpec,
    given: &MachineSpec,
    blockdevs: &[String],
    purpose: Purpose,
) -> Result<Plan, Error> {
    let (stamp, config) = record(restore)?;
    let machine = &config.machine;
    if machine.machine != MACHINE_TYPE {
        return Err(Error::Unknown(format!("machine type '{}'", machine.machine)));
    }
    let mut files = Files::new(restore, &config, node_names(blockdevs))?;
    files.moved &= purpose == Purpose::Restore;
    let vcpus = match u8::try_from(machine.vcpus) {
        Ok(count @ 1..=MAX_VCPUS) => count,
        _ => return Err(Error::Unknown(format!("a machine with {} vCPUs", machine.vcpus))),
    };
    let mut devices = Vec::new();
    let mut nodes = Vec::new();
    let mut missing = Vec::new();
    for device in in_slots(&machine.devices) {
        devices.push(device_spec(device)?);
        let disk = device.disk.as_ref().filter(|disk| !files.given.contains(&disk.node));
        match disk.map(|disk| files.node(disk)) {
            Some(Ok(options)) => nodes.push(options),
            Some(Err(reason)) => missing.push(reason),
            None => {}
        }
    }
    if !missing.is_empty() {
        return Err(Error::Disks(missing));
    }
    let recorded = |name: &String| (!name.is_empty()).then(|| files.absolute(name));
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    let machine = MachineSpec {
        name: given.name.clone().or_else(|| text(&machine.name)),
        uuid: match given.uuid.is_nil() {
            true => Uuid::parse_str(&machine.uuid).unwrap_or_default(),
            false => given.uuid,
        },
        vcpus,
        ram_bytes: machine.ram_bytes,
        kernel: given.kernel.clone().or_else(|| recorded(&machine.kernel)),
        // The recorded initrd belongs to the recorded kernel.
        initrd: match given.kernel {
            Some(_) => given.initrd.clone(),
            None => recorded(&machine.initrd),
        },
        cmdline: match given.kernel {
            Some(_) => given.cmdline.clone(),
            None => machine.command_line.clone(),
        },
        dirty_tracking: given.dirty_tracking,
        acpi: machine.devices.iter().any(|device| device.kind == GENERATION_KIND),
        forked: false,
        devices,
    };
    let saved = config.nodes.iter().map(|node| node.node.clone()).collect();
    Ok(Plan { machine, blockdevs: nodes, stamp, nodes: saved, vmstate: files.vmstate })
}

/// Reads the record of the checkpoint.
fn record(restore: &RestoreSpec) -> Result<(Stamp, CheckpointConfig), Error> {
    let (_user, node) = image::look(&restore.image)?;
    let snapshots = node.snapshots();
    let kept = snapshot::kept_tag(&restore.tag);
    let mut of_tag = snapshots.iter().filter(|s| s.tag == kept).peekable();
    if of_tag.peek().is_none() {
        let others = snapshots.iter().map(|s| s.tag.escape_debug().to_string()).collect();
        return Err(Error::NotFound { tag: restore.tag.clone(), others });
    }
    match of_tag.find(|s| s.vm_state_size > 0) {
        Some(snapshot) => Ok((Stamp::of(snapshot), read_config(&node, &snapshot.id)?)),
        None => Err(Error::DiskOnly(restore.tag.clone())),
    }
}

/// Names of the nodes that the user gives; what cannot be read is told when it is opened.
fn node_names(blockdevs: &[String]) -> Vec<String> {
    let name = |text: &String| {
        let options = text::object(text, "driver").ok()?;
        Some(options.get("node-name")?.as_str()?.to_owned())
    };
    blockdevs.iter().filter_map(name).collect()
}

/// The virtio devices by slot. The others are there in every machine.
fn in_slots(devices: &[DeviceConfig]) -> Vec<&DeviceConfig> {
    let in_slot =
        |device: &&DeviceConfig| device.bus == Bus::Mmio && device.kind != GENERATION_KIND;
    let mut slots: Vec<_> = devices.iter().filter(in_slot).collect();
    slots.sort_by_key(|device| device.address);
    slots
}

fn device_spec(device: &DeviceConfig) -> Result<DeviceSpec, Error> {
    let kind = match (device.kind.as_str(), &device.disk) {
        ("virtio-blk", Some(disk)) => DeviceKind::Block {
            drive: disk.node.clone(),
            serial: disk.serial.clone(),
            queues: device.queues,
            share_rw: disk.share_rw,
            on_error: error_policy(disk)?,
        },
        ("virtio-rng", None) => DeviceKind::Rng,
        _ => return Err(Error::Unknown(format!("device {device}"))),
    };
    let id = (!device.id.is_empty()).then(|| device.id.clone());
    Ok(DeviceSpec { id, kind })
}

/// What is done about errors of a recorded disk.
fn error_policy(disk: &DiskConfig) -> Result<ErrorPolicy, Error> {
    let usual = ErrorPolicy::default();
    let parse = |text: &str, usual| match text {
        "" => Ok(usual),
        text => text.parse().map_err(|error: UnknownOnError| Error::Unknown(error.to_string())),
    };
    Ok(ErrorPolicy {
        read: parse(&disk.rerror, usual.read)?,
        write: parse(&disk.werror, usual.write)?,
    })
}

/// Where the files of a checkpoint's disks are.
struct Files {
    image: PathBuf,
    directory: PathBuf,
    /// The node that the image is.
    vmstate: String,
    /// The file that the image was when the checkpoint was saved.
    was: PathBuf,
    /// Whether it is another file now.
    moved: bool,
    /// Nodes that the user gives.
    given: Vec<String>,
}

impl Files {
    fn new(
        restore: &RestoreSpec,
        config: &CheckpointConfig,
        given: Vec<String>,
    ) -> Result<Self, Error> {
        let directory = PathBuf::from(&config.about.directory);
        let vmstate = vmstate_node(restore, config)?;
        let disks = config.machine.devices.iter().filter_map(|device| device.disk.as_ref());
        let was = disks.into_iter().find(|disk| disk.node == vmstate);
        let was = was.map(|disk| directory.join(&disk.filename)).unwrap_or_default();
        let moved = match (was.canonicalize(), restore.image.canonicalize()) {
            (Ok(was), Ok(now)) => was != now,
            _ => true,
        };
        Ok(Self { image: restore.image.clone(), directory, vmstate, was, moved, given })
    }

    fn absolute(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The options of a disk's node, or why there are none.
    fn node(&self, disk: &DiskConfig) -> Result<Value, String> {
        let name = &disk.node;
        let file = if *name == self.vmstate { self.image.clone() } else { self.file(disk)? };
        if !matches!(disk.format.as_str(), "qcow2" | "raw") {
            return Err(format!(
                "disk '{name}' was a node of driver '{}': give it with --blockdev ...,node-name={name}",
                disk.format
            ));
        }
        Ok(json!({
            "driver": disk.format,
            "node-name": name,
            "read-only": disk.read_only,
            "discard": "unmap",
            "file": { "driver": "file", "filename": file.display().to_string() },
        }))
    }

    /// The file of another disk than the image's.
    fn file(&self, disk: &DiskConfig) -> Result<PathBuf, String> {
        let (name, recorded) = (&disk.node, self.absolute(&disk.filename));
        let hint = format!("give it with --blockdev driver={},node-name={name},...", disk.format);
        let beside = self.beside(&recorded);
        if let Some(beside) = beside.as_ref().filter(|path| path.exists()) {
            return Ok(beside.clone());
        }
        // Reading it hurts nobody.
        if (!self.moved || disk.read_only) && recorded.exists() {
            return Ok(recorded);
        }
        let looked_for = beside.as_ref().unwrap_or(&recorded).display().to_string();
        if recorded.exists() {
            return Err(format!(
                "disk '{name}' was '{}', and the image has been moved or copied since; {hint}",
                recorded.display()
            ));
        }
        Err(format!("disk '{name}' is missing: there is no '{looked_for}'; {hint}"))
    }

    /// Where a file is that lay at or below the image's directory, if it moved with the image.
    fn beside(&self, recorded: &Path) -> Option<PathBuf> {
        let below = recorded.strip_prefix(self.was.parent()?).ok()?;
        Some(self.image.parent()?.join(below))
    }
}

/// The node that the image is: recorded since version 2 of the configuration.
fn vmstate_node(restore: &RestoreSpec, config: &CheckpointConfig) -> Result<String, Error> {
    if !config.about.vmstate.is_empty() {
        return Ok(config.about.vmstate.clone());
    }
    if let [only] = config.nodes.as_slice() {
        return Ok(only.node.clone());
    }
    let file_name = restore.image.file_name();
    let disks = config.machine.devices.iter().filter_map(|device| device.disk.as_ref());
    let mut same = disks.filter(|disk| Path::new(&disk.filename).file_name() == file_name);
    match (same.next(), same.next()) {
        (Some(disk), None) => Ok(disk.node.clone()),
        _ => {
            let names: Vec<_> = config.nodes.iter().map(|node| node.node.clone()).collect();
            Err(Error::WhichDisk(names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests;
