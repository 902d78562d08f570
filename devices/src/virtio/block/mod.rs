//! virtio-blk: a disk (virtio 1.2 section 5.2) over a [`block::Node`](::block::Node).

mod config;
mod counters;
mod errors;
mod io;
mod pending;
pub mod request;
mod state;
#[cfg(test)]
mod tests;
mod throttled;

pub use config::QUEUE_SIZE;
pub(crate) use config::SECTOR_SIZE;
pub use counters::{IoCounters, IoKind, IoSums};
pub use errors::{
    ErrorAction, ErrorPolicy, Failure, FailureSink, IoErrors, IoStatus, OnError, UnknownOnError,
};
pub use state::BlockState;
pub use throttled::IoThrottle;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};

use super::error::StateError;
use super::{DeviceState, QueueHandler, VirtioDevice};
use crate::Presence;

const DEVICE_TYPE: u32 = 2;

/// Bytes of a disk's serial number.
pub(crate) const SERIAL_SIZE: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Queues a disk has at most.
pub const MAX_QUEUES: u16 = 64;

/// Why a disk cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The serial number is too long.
    #[error("serial '{0}' is longer than {SERIAL_SIZE} bytes")]
    Serial(String),
    /// The number of queues is out of range.
    #[error("num-queues is {0}, must be 1 to {MAX_QUEUES}")]
    NumQueues(u16),
}

/// What a user can choose of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockOptions {
    /// Serial number that the guest reads; up to [`SERIAL_SIZE`] bytes.
    pub serial: String,
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub num_queues: u16,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self { serial: String::new(), num_queues: 1 }
    }
}

/// A disk.
pub struct BlockDevice {
    name: String,
    link: ::block::Link,
    options: BlockOptions,
    /// In sectors, as the guest is told; the thread that serves requests reads it too.
    capacity: Arc<AtomicU64>,
    read_only: bool,
    config: Vec<u8>,
    presence: Presence,
    counters: Arc<IoCounters>,
    errors: Arc<IoErrors>,
    throttle: Arc<IoThrottle>,
}

impl BlockDevice {
    /// A disk over the node, as writable as it is now. Another size is followed by
    /// [`VirtioDevice::refresh_config`].
    pub fn new(
        link: impl Into<::block::Link>,
        options: BlockOptions,
    ) -> Result<Self, OptionsError> {
        let link = link.into();
        let node = link.node();
        if options.serial.len() > SERIAL_SIZE {
            return Err(OptionsError::Serial(options.serial));
        }
        if !(1..=MAX_QUEUES).contains(&options.num_queues) {
            return Err(OptionsError::NumQueues(options.num_queues));
        }
        let capacity = sectors(&node);
        let read_only = node.read_only();
        Ok(Self {
            config: config::space(capacity, options.num_queues, read_only),
            name: node.name().to_owned(),
            link,
            options,
            capacity: Arc::new(AtomicU64::new(capacity)),
            read_only,
            presence: Presence::default(),
            counters: Arc::default(),
            throttle: Arc::default(),
            // Nobody has asked to stop the machine on errors: all of them go to the guest.
            errors: Arc::new(IoErrors::new(
                ErrorPolicy { read: OnError::Report, write: OnError::Report },
                Box::new(|_| {}),
            )),
        })
    }

    /// What is done about requests that fail on the host; without it they are reported to the guest.
    /// A failure whose action is [`ErrorAction::Stop`] must have the machine paused and resumed
    /// sometime.
    #[must_use]
    pub fn with_errors(mut self, errors: Arc<IoErrors>) -> Self {
        self.errors = errors;
        self
    }

    /// What requests come to.
    pub fn counters(&self) -> &Arc<IoCounters> {
        &self.counters
    }

    /// Its limits.
    pub fn throttle(&self) -> &Arc<IoThrottle> {
        &self.throttle
    }

    /// Guest memory may have pages that come when they are touched.
    #[must_use]
    pub fn with_presence(mut self, presence: Presence) -> Self {
        self.presence = presence;
        self
    }

    fn block_state(&self) -> BlockState {
        BlockState {
            capacity: self.capacity.load(Ordering::Acquire),
            read_only: self.read_only,
            serial: self.options.serial.clone(),
        }
    }
}

impl VirtioDevice for BlockDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn device_features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.options.num_queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.options.num_queues)]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn refresh_config(&mut self) -> bool {
        let capacity = sectors(&self.link.node());
        if self.capacity.swap(capacity, Ordering::AcqRel) == capacity {
            return false;
        }
        self.config = config::space(capacity, self.options.num_queues, self.read_only);
        true
    }

    fn handler(&self) -> ::block::Result<Box<dyn QueueHandler>> {
        let shared = io::Shared {
            counters: Arc::clone(&self.counters),
            errors: Arc::clone(&self.errors),
            throttle: Arc::clone(&self.throttle),
        };
        let most = usize::from(QUEUE_SIZE) * usize::from(self.options.num_queues);
        let capacity = Arc::clone(&self.capacity);
        let disk = io::Disk { capacity, serial: &self.options.serial, most };
        let (link, presence) = (self.link.clone(), self.presence.clone());
        Ok(Box::new(io::BlockHandler::new(link, disk, presence, shared)?))
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(self.block_state())
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(saved) = state else {
            return StateError::unless_equal("device", &state.kind(), &self.state().kind());
        };
        // Of the disk as it is, which may have gone back to another size just now.
        let capacity = sectors(&self.link.node());
        StateError::unless_equal("capacity in sectors", &saved.capacity, &capacity)?;
        StateError::unless_equal("read-only", &saved.read_only, &self.read_only)?;
        StateError::unless_equal("serial", &saved.serial, &self.options.serial)
    }
}

/// Whole sectors of a disk.
fn sectors(node: &::block::Node) -> u64 {
    node.size() / SECTOR_SIZE
}
