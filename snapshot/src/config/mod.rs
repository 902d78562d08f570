//! What a machine is, as far as a checkpoint depends on it, and how two machines differ.
//!
//! A checkpoint records the machine it was taken of. Before a load touches anything, that record is
//! compared with the machine there is. What the guest would notice must be the same; what it would
//! not is told but does not stand in the way:
//!
//! | must be the same | told only |
//! |---|---|
//! | machine type, RAM, number of vCPUs | kernel and its command line (the guest's RAM holds them; a reset uses this machine's) |
//! | CPU vendor | CPU family, model, stepping |
//! | every feature that the guest was told of must be offered here | features offered beyond |
//! | each device: kind, address, interrupt, queues | |
//! | each disk: node, size, read-only, serial | its file name |

mod cpuid;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use cpuid::{CpuFacts, CpuidLeaf};

use crate::about::About;
use crate::format::FormatError;
use crate::format::section::{Section, SectionReader};
use crate::units::human;

/// Version of the configuration section's payload.
pub(crate) const CONFIG_VERSION: u32 = 2;

/// Kind of the configuration section; its instance is 0.
pub(crate) const CONFIG_KIND: &str = "config";

/// Most bytes of its payload. Those of all checkpoints in an image are read to list them.
pub(crate) const MAX_CONFIG: u64 = 1 << 20;

/// What was on the command line and what the guest was told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Machine type: "microvm".
    pub machine: String,
    /// Guest RAM in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What the guest was told of its CPUs.
    pub cpu: CpuFacts,
    /// File name of the kernel.
    pub kernel: String,
    /// Kernel command line.
    pub command_line: String,
    /// File name of the initial ramdisk; empty if there is none. Since version 2.
    #[serde(default)]
    pub initrd: String,
    /// The machine's name; empty if it has none. Since version 2.
    #[serde(default)]
    pub name: String,
    /// The machine's UUID; empty if it has none. Since version 2.
    #[serde(default)]
    pub uuid: String,
    /// Every device the guest sees.
    pub devices: Vec<DeviceConfig>,
}

/// A device as the guest finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// Model: "virtio-blk", "serial".
    pub kind: String,
    /// QEMU's device id; empty if none was given.
    pub id: String,
    /// How the guest reaches its registers.
    pub bus: Bus,
    /// Its first register.
    pub address: u64,
    /// Its interrupt line.
    pub irq: Option<u32>,
    /// Number of request queues; 0 for a device without.
    pub queues: u16,
    /// What a disk has on top.
    pub disk: Option<DiskConfig>,
}

/// How a guest reaches a device's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// Memory-mapped at a guest physical address.
    Mmio,
    /// I/O ports.
    Pio,
}

/// A disk as the guest finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Name of its block node.
    pub node: String,
    /// Size in bytes.
    pub size: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Serial number as the guest reads it.
    pub serial: String,
    /// Format of the image: "qcow2".
    pub format: String,
    /// File name of the image.
    pub filename: String,
    /// Whether others may write to it meanwhile. Since version 2.
    #[serde(default)]
    pub share_rw: bool,
    /// What is done about reads that fail on the host; empty for what is usual. Since version 2.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rerror: String,
    /// About all other requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub werror: String,
}

/// A node that a checkpoint is stored on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointNode {
    /// Its name.
    pub node: String,
    /// Size of its disk in bytes.
    pub size: u64,
}

/// The payload of the configuration section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// The machine that was saved.
    pub machine: MachineConfig,
    /// The nodes whose disks belong to the checkpoint.
    pub nodes: Vec<CheckpointNode>,
    /// Ancestry and description. Since version 2.
    #[serde(default)]
    pub about: About,
}

/// The configuration as a section.
///
/// # Errors
/// It is larger than [`MAX_CONFIG`].
pub(crate) fn encode_config(config: &CheckpointConfig) -> Result<Section, FormatError> {
    let section = Section::encode(CONFIG_KIND, 0, CONFIG_VERSION, config)?;
    let len = section.bytes.len();
    if len as u64 > MAX_CONFIG {
        let reason = format!("it has {len} bytes, at most {MAX_CONFIG} are kept");
        return Err(FormatError::Encode { name: section.name, reason });
    }
    Ok(section)
}

/// Takes the configuration out of a checkpoint's sections.
pub(crate) fn decode_config(sections: &[Section]) -> Result<CheckpointConfig, FormatError> {
    SectionReader::new(sections).take(CONFIG_KIND, 0, 1..=CONFIG_VERSION)
}

/// One way in which a machine differs from a saved one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    text: String,
    blocking: bool,
}

impl Difference {
    pub(crate) fn blocking(text: String) -> Self {
        Self { text, blocking: true }
    }

    /// Whether the checkpoint cannot be loaded because of it.
    pub fn is_blocking(&self) -> bool {
        self.blocking
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Collects differences while two machines are compared.
#[derive(Debug, Default)]
struct Differences(Vec<Difference>);

#[allow(
    clippy::needless_pass_by_value,
    reason = "what is compared is often a text made for the comparison"
)]
impl Differences {
    fn refuse(&mut self, text: String) {
        self.0.push(Difference::blocking(text));
    }

    /// Compares one thing that can be printed.
    fn compare<T: PartialEq + fmt::Display>(&mut self, what: &str, saved: T, here: T) {
        if saved != here {
            let text = format!("{what}: the checkpoint has {saved}, this machine {here}");
            self.refuse(text);
        }
    }

    /// Compares one thing that the guest would not notice.
    fn note<T: PartialEq + fmt::Display>(&mut self, what: &str, saved: T, here: T) {
        if saved != here {
            self.0.push(Difference {
                text: format!("{what}: the checkpoint has {saved}, this machine {here}"),
                blocking: false,
            });
        }
    }
}

impl MachineConfig {
    /// As [`MachineConfig::differences`] for a machine that comes as a stream: its disks are those at the same
    /// places, by whatever names. Only in images is something found by a node's name.
    pub fn differences_from_stream(&self, saved: &Self) -> Vec<Difference> {
        let mut saved = saved.clone();
        for device in &mut saved.devices {
            let here = self.devices.iter().find(|here| here.is_at(device));
            let disks = (&mut device.disk, here.and_then(|here| here.disk.as_ref()));
            if let (Some(there), Some(here)) = disks {
                there.node.clone_from(&here.node);
            }
        }
        self.differences(&saved)
    }

    /// How this machine differs from a saved one, in the module's terms; empty if it does not.
    pub fn differences(&self, saved: &Self) -> Vec<Difference> {
        let mut out = Differences::default();
        out.compare("machine type", quote(&saved.machine), quote(&self.machine));
        out.compare("RAM", human(saved.ram_bytes), human(self.ram_bytes));
        out.compare("vCPUs", saved.vcpus, self.vcpus);
        cpuid::compare(&saved.cpu, &self.cpu, &mut out);
        compare_devices(&saved.devices, &self.devices, &mut out);
        out.note("kernel", quote(&saved.kernel), quote(&self.kernel));
        let lines = (quote(&saved.command_line), quote(&self.command_line));
        out.note("kernel command line", lines.0, lines.1);
        out.0
    }
}

impl CheckpointConfig {
    /// What of the machine `here` is not as it was, for a load from images: as
    /// [`MachineConfig::differences`], but the disks that belong to the checkpoint go back to the sizes they
    /// had then.
    pub fn differences(&self, here: &MachineConfig) -> Vec<Difference> {
        let mut here = here.clone();
        let disks = here.devices.iter_mut().filter_map(|device| device.disk.as_mut());
        for disk in disks {
            if let Some(saved) = self.nodes.iter().find(|saved| saved.node == disk.node) {
                disk.size = saved.size;
            }
        }
        here.differences(&self.machine)
    }
}

/// Devices are the same device if they are at the same address: that is all the guest knows.
fn compare_devices(saved: &[DeviceConfig], here: &[DeviceConfig], out: &mut Differences) {
    for device in saved {
        match here.iter().find(|other| other.is_at(device)) {
            Some(other) => compare_device(device, other, out),
            None => {
                out.refuse(format!(
                    "device {device}: the checkpoint has it, this machine does not"
                ));
            }
        }
    }
    for device in here {
        if !saved.iter().any(|other| other.is_at(device)) {
            out.refuse(format!("device {device}: this machine has it, the checkpoint does not"));
        }
    }
}

fn compare_device(saved: &DeviceConfig, here: &DeviceConfig, out: &mut Differences) {
    if saved.kind != here.kind {
        let what = format!("device at {}", saved.place());
        out.compare(&what, saved.to_string(), here.to_string());
        return;
    }
    let what = |property: &str| format!("device {saved}, {property}");
    let irq = |irq: Option<u32>| irq.map_or("none".to_owned(), |irq| irq.to_string());
    out.compare(&what("interrupt"), irq(saved.irq), irq(here.irq));
    out.compare(&what("number of queues"), saved.queues, here.queues);
    match (&saved.disk, &here.disk) {
        (Some(saved), Some(here)) => {
            out.compare(&what("node"), quote(&saved.node), quote(&here.node));
            out.compare(&what("disk size"), human(saved.size), human(here.size));
            let access = |read_only| if read_only { "read-only" } else { "writable" };
            let (was, is) = (access(saved.read_only), access(here.read_only));
            out.compare(&what("access"), was, is);
            out.compare(&what("serial"), quote(&saved.serial), quote(&here.serial));
            out.note(&what("format"), quote(&saved.format), quote(&here.format));
            let files = (quote(&saved.filename), quote(&here.filename));
            out.note(&what("file"), files.0, files.1);
        }
        (saved, here) => {
            let disk = |disk: bool| if disk { "a disk" } else { "no disk" };
            out.compare(&what("disk"), disk(saved.is_some()), disk(here.is_some()));
        }
    }
}

impl DeviceConfig {
    fn is_at(&self, other: &Self) -> bool {
        (self.bus, self.address) == (other.bus, other.address)
    }

    fn place(&self) -> String {
        let bus = match self.bus {
            Bus::Mmio => "",
            Bus::Pio => "port ",
        };
        format!("{bus}{:#x}", self.address)
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(disk) = &self.disk {
            write!(f, " '{}'", disk.node)?;
        }
        write!(f, " at {}", self.place())
    }
}

fn quote(text: &str) -> String {
    format!("'{text}'")
}
