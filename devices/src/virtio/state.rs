//! The saved state of a virtio device, apart from its transport's selectors.

use serde::{Deserialize, Serialize};

use super::block::BlockState;
use super::rng::RngState;

/// The registers and positions of one queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Largest size the device allows, in descriptors.
    pub max_size: u16,
    /// Size the driver chose, in descriptors, as it wrote it.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Available index of the next request to take.
    pub next_avail: u16,
    /// Used index of the next request to give back.
    pub next_used: u16,
    /// First descriptors of requests that were taken and are not given back: they failed on the
    /// host, and are served again. Since version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<u16>,
}

impl QueueState {
    /// Version of the struct.
    pub const VERSION: u32 = 2;

    /// A queue after device reset.
    pub(crate) fn after_reset(max_size: u16) -> Self {
        Self { max_size, size: u32::from(max_size), ..Self::default() }
    }
}

/// A virtio device, whatever its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Device type (virtio 1.2 section 5).
    pub device_type: u32,
    /// Features the driver wrote; those it negotiated once FEATURES_OK is in the status.
    pub driver_features: u64,
    /// The device status register, DEVICE_NEEDS_RESET included.
    pub status: u32,
    /// The interrupt status register.
    pub interrupt_status: u32,
    /// The configuration generation register.
    pub config_generation: u32,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// What only this type of device has.
    pub device: DeviceState,
}

impl VirtioState {
    /// Version of the struct.
    pub const VERSION: u32 = 2;
}

/// What only one type of device has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A disk.
    Block(BlockState),
    /// An entropy source.
    Rng(RngState),
}

impl DeviceState {
    /// Version of the enum.
    pub const VERSION: u32 = 1;

    /// The type's name for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Block(_) => "virtio-blk",
            Self::Rng(_) => "virtio-rng",
        }
    }
}
