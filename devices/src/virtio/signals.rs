//! What a device's thread and its registers share: interrupts and the needs-reset flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::InterruptLine;

/// The bits the interrupt status register can have.
pub(super) const INTERRUPT_BITS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

pub(super) struct Signals {
    line: Arc<dyn InterruptLine>,
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
}

impl Signals {
    pub(super) fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { line, interrupt_status: AtomicU32::new(0), needs_reset: AtomicBool::new(false) }
    }

    /// Tells the driver that a request is done.
    pub(super) fn request_done(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver to read the configuration space again (section 2.3).
    pub(super) fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver, which must have set DRIVER_OK (section 2.1.2).
    pub(super) fn needs_reset_now(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Sets both registers without an interrupt. The device's thread must not be serving.
    pub(super) fn set(&self, interrupt_status: u32, needs_reset: bool) {
        self.interrupt_status.store(interrupt_status, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Sends an edge if the driver has an interrupt to acknowledge.
    pub(super) fn raise_again(&self) {
        if self.interrupt_status() != 0 {
            self.trigger();
        }
    }

    fn raise(&self, bit: u32) {
        // Before the edge, so that the handler it starts finds the bit.
        self.interrupt_status.fetch_or(bit, Ordering::AcqRel);
        self.trigger();
    }

    fn trigger(&self) {
        if let Err(error) = self.line.trigger() {
            tracing::error!(%error, "virtio: interrupt cannot be triggered");
        }
    }
}
