//! The saved state of a device behind the MMIO transport.

use serde::{Deserialize, Serialize};

use crate::virtio::state::VirtioState;

/// The transport's selectors and the device behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// QueueSel.
    pub queue_sel: u32,
    /// The device.
    pub virtio: VirtioState,
}

impl MmioState {
    /// Version of the struct and of all it holds.
    pub const VERSION: u32 = 2;

    /// The version that it is stored with: 2 only where a reader of version 1 would lose something,
    /// which are requests that are held.
    pub fn version(&self) -> u32 {
        let holds = self.virtio.queues.iter().any(|queue| !queue.held.is_empty());
        if holds { 2 } else { 1 }
    }
}
