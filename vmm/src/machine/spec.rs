//! The specification that a machine is built from.

use std::path::PathBuf;

use devices::virtio::block::ErrorPolicy;
use uuid::Uuid;

/// A machine as the command line asks for it.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// For query-name.
    pub name: Option<String>,
    /// For query-uuid; nil where none was given.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest RAM in bytes.
    pub ram_bytes: u64,
    /// Kernel; a machine without one can only be revived.
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, without what the machine adds for its devices.
    pub cmdline: String,
    /// Whether what the guest writes may be tracked between checkpoints.
    pub dirty_tracking: bool,
    /// Whether the guest finds ACPI tables, and a VM generation id.
    pub acpi: bool,
    /// RAM is to be mapped from an image in part: see [`crate::fork`].
    pub forked: bool,
    /// Devices in the order of the command line, which is that of their slots.
    pub devices: Vec<DeviceSpec>,
}

/// One `--device`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The user's `id`, where one was given.
    pub id: Option<String>,
    /// What it is.
    pub kind: DeviceKind,
}

/// The devices there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// `virtio-blk-device`
    Block {
        /// Name of the block node.
        drive: String,
        /// What get-id tells; at most 20 bytes.
        serial: String,
        /// Number of request queues.
        queues: u16,
        /// Whether others may write to the disk meanwhile.
        share_rw: bool,
        /// What is done about requests that fail on the host.
        on_error: ErrorPolicy,
    },
    /// `virtio-rng-device`
    Rng,
}
