//! Virtio 1.2 devices: what is common to all, apart from how a guest reaches them ([`mmio`]) and
//! what they are ([`block`], [`rng`]).

pub mod block;
mod chain;
mod core;
mod error;
mod filled;
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
pub(crate) use filled::mark_filled;
pub use mmio::{MmioState, MmioTransport};
pub use rng::RngDevice;
pub use state::{DeviceState, QueueState, VirtioState};

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::GuestMemory;

/// Feature bits that the transport and the rings offer for every device (section 6).
pub(crate) const COMMON_FEATURES: u64 = {
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

    /// Has the configuration space tell what is so now; whether it told something else before.
    fn refresh_config(&mut self) -> bool {
        false
    }

    /// What serves the device's requests, on a thread of its own. Called once.
    ///
    /// # Errors
    /// If the host has no descriptors or memory left for it.
    fn handler(&self) -> ::block::Result<Box<dyn QueueHandler>>;

    /// What the guest was told that is not in the transport's state.
    fn state(&self) -> DeviceState;

    /// Whether a guest with that state can go on with this device.
    fn check_state(&self, state: &DeviceState) -> std::result::Result<(), StateError>;
}

/// A request of a driver: where its chain goes back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Index of the queue.
    pub queue: usize,
    /// The chain's first descriptor.
    pub head: u16,
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// It is done; so many bytes were written into the chain's writable part.
    Done(u32),
    /// [`QueueHandler::ended`] will tell.
    Later,
}

/// A request that was served later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub token: Token,
    /// How.
    pub end: End,
}

/// How a request that was served later has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is done; so many bytes were written into the chain's writable part.
    Done(u32),
    /// It is to be served again, from its chain, when the machine is resumed.
    Held,
}

/// What serves a device's requests.
pub trait QueueHandler: Send {
    /// The driver is ready and has accepted `features`.
    fn start(&mut self, features: u64);

    /// Serves a request, or takes it to be served later. An error puts the device into needs-reset.
    fn serve(
        &mut self,
        token: Token,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> std::result::Result<Served, Malformed>;

    /// Readable while there are requests that ended later. Only for a handler that says so.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Starts what was taken, and gives the requests that have ended since the last call. With `all`
    /// it waits until none is left.
    fn ended(&mut self, _all: bool, _mem: &GuestMemory, _out: &mut Vec<Ended>) {}

    /// Whether so many requests wait that it takes no more for now. [`QueueHandler::ended`] may change
    /// that.
    fn is_full(&self) -> bool {
        false
    }

    /// How long until [`QueueHandler::ended`] has something to do, whatever [`QueueHandler::event`] says;
    /// `None` for never.
    fn wait(&self) -> Option<Duration> {
        None
    }

    /// The machine goes on: what is held is served again next.
    fn resumed(&mut self) {}

    /// Makes everything that was served durable. Comes when nothing is left to be served.
    fn flush(&mut self) -> ::block::Result<()>;
}
