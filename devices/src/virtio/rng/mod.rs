//! virtio-rng: an entropy source (virtio 1.2 section 5.4) fed by getrandom(2).

mod io;
mod state;
#[cfg(test)]
mod tests;

pub use state::RngState;

use super::error::StateError;
use super::{DeviceState, QueueHandler, VirtioDevice};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 64;

/// An entropy source.
#[derive(Debug, Clone)]
pub struct RngDevice {
    name: String,
}

impl RngDevice {
    /// A source with the device's name, such as "rng0".
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }
}

impl VirtioDevice for RngDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn device_features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn handler(&self) -> ::block::Result<Box<dyn QueueHandler>> {
        Ok(Box::new(io::RngHandler))
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(RngState {})
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), StateError> {
        StateError::unless_equal("device", &state.kind(), &self.state().kind())
    }
}
