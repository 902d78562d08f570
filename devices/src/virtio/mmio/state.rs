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
    pub const VERSION: u32 = 1;
}
