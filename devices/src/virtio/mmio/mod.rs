//! The virtio-mmio transport: version 2 registers of virtio 1.2 section 4.2.2.

mod state;
#[cfg(test)]
mod tests;

pub use state::MmioState;

use std::sync::Arc;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::core::{VirtioCore, set_half};
use super::error::Result;
use super::state::QueueState;
use crate::{GuestMemory, InterruptLine};

/// Bytes of address space a device takes.
pub const MMIO_SIZE: u64 = 0x1000;

/// Offset of QueueNotify in bytes, where notifications are to become eventfds.
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"TARD");

/// A virtio device at a range of guest physical addresses.
///
/// The vCPU's accesses come through [`MmioTransport::read`] and [`MmioTransport::write`], with
/// offsets from the start of the range. The machine registers [`MmioTransport::queue_notify_fds`]
/// so that notifications pass by; those that still come as writes have the same effect.
pub struct MmioTransport {
    core: VirtioCore,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl MmioTransport {
    /// Makes the transport and starts the device's thread, which inherits the caller's signal mask.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        irq: Arc<dyn InterruptLine>,
    ) -> Result<Self> {
        Ok(Self {
            core: VirtioCore::new(device, mem, irq)?,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        self.core.device().name()
    }

    /// One eventfd a queue, to be signalled by writes of the queue's index to
    /// [`QUEUE_NOTIFY_OFFSET`].
    pub fn queue_notify_fds(&self) -> &[EventFd] {
        self.core.queue_notify_fds()
    }

    /// A load by the guest. Registers are 32 bits wide; anything else reads as zeroes.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            return self.read_config(offset, data);
        }
        match (u32::try_from(offset), <&mut [u8; 4]>::try_from(data)) {
            (Ok(offset), Ok(data)) => *data = self.register(offset).to_le_bytes(),
            _ => self.core.refuse("register read that is not 32 bits wide"),
        }
    }

    /// A store by the guest. Registers are 32 bits wide; anything else is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            return self.core.refuse("write to configuration space");
        }
        match (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            (Ok(offset), Ok(data)) => self.set_register(offset, u32::from_le_bytes(data)),
            _ => self.core.refuse("register write that is not 32 bits wide"),
        }
    }

    /// Quiesces the device: when this returns, every request it took is done and given back, and
    /// its thread touches neither guest memory nor the disk until [`MmioTransport::resume`].
    pub fn pause(&mut self) -> Result<()> {
        self.core.pause()
    }

    /// Lets a paused device go on. Raises an unacknowledged interrupt again and looks at every
    /// queue once, because either may have been on its way when the state was taken.
    pub fn resume(&mut self) -> Result<()> {
        self.core.resume()
    }

    /// Has requests that failed on the host done again, paused or not.
    pub fn retry(&mut self) -> Result<()> {
        self.core.retry()
    }

    /// Has the device look again whether it may go on, as its limits were changed.
    pub fn look(&self) -> Result<()> {
        self.core.look()
    }

    /// The disk behind the device may have another size: if it has, the driver is told.
    pub fn refresh_config(&mut self) {
        self.core.refresh_config();
    }

    /// What to save; only of a paused device.
    pub fn state(&self) -> Result<MmioState> {
        Ok(MmioState {
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            virtio: self.core.state()?,
        })
    }

    /// Replaces everything with a saved state and leaves the device paused, whatever it was. A
    /// state that does not fit is refused before anything changes.
    pub fn restore(&mut self, state: &MmioState) -> Result<()> {
        self.core.restore(&state.virtio)?;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        Ok(())
    }

    /// Machine reset: as at power-on. A paused device stays paused.
    pub fn reset(&mut self) {
        self.core.reset();
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
    }

    /// Ends the request in progress, flushes, and ends the thread; tells if the flush failed. The
    /// device can do nothing afterwards. Dropping does the same and logs a failure.
    pub fn shutdown(&mut self) -> Result<()> {
        self.core.shutdown()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.core.device().config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = config.get(start..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(there) {
            *to = *from;
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let queue = self.core.queue(self.queue_sel);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.core.device().device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.core.offered_features(), self.device_features_sel)
            }
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |q| u32::from(q.max_size)),
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.core.interrupt_status(),
            VIRTIO_MMIO_STATUS => self.core.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.core.config_generation(),
            // No shared memory regions: all ones (section 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => {
                self.core.refuse("read of a register that is not there");
                0
            }
        }
    }

    fn set_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => match self.driver_features_sel {
                0 => self.core.write_driver_features(false, value),
                1 => self.core.write_driver_features(true, value),
                // Drivers may write zeroes to feature words that are not there.
                _ if value == 0 => {}
                _ => self.core.refuse("features beyond bit 63"),
            },
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_READY => {
                self.core.write_queue_ready(self.queue_sel, value & 1 != 0);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => self.core.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.core.acknowledge_interrupt(value),
            VIRTIO_MMIO_STATUS => self.core.write_status(value),
            VIRTIO_MMIO_QUEUE_NUM => self.set_up_queue(|q| q.size = value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.set_up_queue(|q| set_half(&mut q.desc_table, false, value));
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_up_queue(|q| set_half(&mut q.desc_table, true, value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_up_queue(|q| set_half(&mut q.avail_ring, false, value));
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_up_queue(|q| set_half(&mut q.avail_ring, true, value));
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.set_up_queue(|q| set_half(&mut q.used_ring, false, value));
            }
            VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.set_up_queue(|q| set_half(&mut q.used_ring, true, value));
            }
            _ => self.core.refuse("write to a register that is not there"),
        }
    }

    fn set_up_queue(&mut self, set: impl FnOnce(&mut QueueState)) {
        if let Some(queue) = self.core.queue_to_set_up(self.queue_sel) {
            set(queue);
        }
    }
}

/// The half of a 64-bit register that a selector chooses; nothing is beyond.
fn half(register: u64, selector: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = register.to_le_bytes();
    match selector {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
