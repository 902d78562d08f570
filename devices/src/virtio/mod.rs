//! Virtio 1.2 devices: what is common to all, apart from how a guest reaches them ([`mmio`]) and
//! what they are ([`block`], [`rng`]).

pub mod block;
mod chain;
mod core;
mod error;
pub mod mmio;
mod queue;
pub mod rng;
mod signals;
pub mod state;
#[cfg(test)]
mod testing;
mod worker;

pub use block::{BlockDevice, BlockOptions};
pub use chain::{Chain, Malformed, Segment, SegmentList};
pub use error::{Error, Result, StateError};
pub use mmio::{MmioState, MmioTransport};
pub use rng::RngDevice;
pub use state::{DeviceState, QueueState, VirtioState};

use crate::GuestMemory;

/// Feature bits that the transport and the rings offer for every device (section 6).
pub const COMMON_FEATURES: u64 = {
    use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
    use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
};

/// What a virtio device is, as its driver sees it before it sends the first request.
pub trait VirtioDevice: Send {
    /// The device's name; its thread is named after it.
    fn name(&self) -> &str;

    /// Device type (section 5): 2 is a disk, 4 an entropy source.
    fn device_type(&self) -> u32;

    /// Feature bits of this device type that it offers.
    fn device_features(&self) -> u64;

    /// Largest size of each queue, in descriptors; each a power of two up to 32768.
    fn queue_max_sizes(&self) -> Vec<u16>;

    /// The configuration space. Reads beyond its end give zeroes; none of it is writable.
    fn config(&self) -> &[u8];

    /// What serves the device's requests, on a thread of its own. Called once.
    fn handler(&self) -> Box<dyn QueueHandler>;

    /// What the guest was told that is not in the transport's state.
    fn state(&self) -> DeviceState;

    /// Whether a guest with that state can go on with this device.
    fn check_state(&self, state: &DeviceState) -> std::result::Result<(), StateError>;
}

/// What serves a device's requests.
pub trait QueueHandler: Send {
    /// The driver is ready and has accepted `features`.
    fn start(&mut self, features: u64);

    /// Serves one request from the queue of that index and returns how many bytes were written into
    /// the chain's writable part. An error puts the device into needs-reset.
    fn serve(
        &mut self,
        queue: usize,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> std::result::Result<u32, Malformed>;

    /// Makes everything that was served durable.
    fn flush(&mut self) -> ::block::Result<()>;
}
