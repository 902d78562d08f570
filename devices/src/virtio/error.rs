//! What can fail between the machine and a virtio device. Nothing a driver does is here.

use std::io;

/// The result of an operation on a virtio device.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a virtio device failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device could not be set up: the host gave no thread, eventfd or epoll.
    #[error("device '{device}': cannot get {what}: {source}")]
    Setup {
        /// The device's name.
        device: String,
        /// "a thread", "an eventfd", ...
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The device has a queue of an impossible size.
    #[error("device '{device}': {size} is no virtqueue size (powers of two up to 32768)")]
    QueueSize {
        /// The device's name.
        device: String,
        /// The size in descriptors.
        size: u16,
    },
    /// The device's thread has ended; the device can do no more.
    #[error("device '{device}': its thread has ended")]
    ThreadEnded {
        /// The device's name.
        device: String,
    },
    /// The operation needs a paused device.
    #[error("device '{device}' is not paused")]
    NotPaused {
        /// The device's name.
        device: String,
    },
    /// The last flush failed; writes may be lost.
    #[error("device '{device}': flush failed: {source}")]
    Flush {
        /// The device's name.
        device: String,
        /// What the image said.
        source: ::block::Error,
    },
    /// A saved state does not fit; the device is as it was.
    #[error("device '{device}': {source}")]
    State {
        /// The device's name.
        device: String,
        /// Which field, and why.
        source: StateError,
    },
}

/// Why a saved state does not fit the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A value that must be equal is not.
    #[error("{field} was {saved} when the state was saved, and is {present}")]
    Differs {
        /// The field's name for people.
        field: &'static str,
        /// In the state.
        saved: String,
        /// In the device.
        present: String,
    },
    /// The driver uses features that the device does not offer.
    #[error("the driver negotiated features {0:#x}, which the device does not offer")]
    Features(u64),
    /// The status register holds bits that cannot be set together or do not exist.
    #[error("device status {0:#x} is impossible")]
    Status(u32),
    /// The interrupt status register holds bits that do not exist.
    #[error("interrupt status {0:#x} is impossible")]
    InterruptStatus(u32),
    /// A queue in use breaks the rules of its registers.
    #[error("queue {index}: {reason}")]
    Queue {
        /// Index of the queue.
        index: usize,
        /// The rule that is broken.
        reason: String,
    },
}

impl StateError {
    /// Refuses a value that is not the device's own.
    pub(crate) fn unless_equal<T: PartialEq + std::fmt::Display>(
        field: &'static str,
        saved: &T,
        present: &T,
    ) -> std::result::Result<(), Self> {
        if saved == present {
            return Ok(());
        }
        Err(Self::Differs { field, saved: saved.to_string(), present: present.to_string() })
    }
}
