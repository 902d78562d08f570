//! Devices on the bus: which accesses reach which of their registers.

use std::sync::{Arc, Mutex, PoisonError};

use devices::InterruptLine;
use devices::legacy::{I8042, Serial};
use devices::virtio::MmioTransport;

use super::map::SLEEP_TYPE_S5_VALUE;
use crate::bus::BusDevice;

/// SLP_EN, and SLP_TYP in bits 4:2 of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 0b111 << 2;
const SLEEP_TYPE_S5: u8 = SLEEP_TYPE_S5_VALUE << 2;

/// The console on the bus: byte registers, so a string instruction's bytes all go to one register.
pub(super) struct SerialPort(pub(super) Serial);

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.0.read(register(offset));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for byte in data {
            self.0.write(register(offset), *byte);
        }
    }
}

/// The keyboard controller, of which only the reset line is there.
pub(super) struct ResetController(pub(super) I8042);

impl BusDevice for ResetController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.0.read(register(offset));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for byte in data {
            if let Err(error) = self.0.write(register(offset), *byte) {
                tracing::error!("the guest's reset cannot be signalled: {error}");
            }
        }
    }
}

/// A register of a device with at most eight; the bus keeps offsets within the device.
fn register(offset: u64) -> u8 {
    u8::try_from(offset).unwrap_or(u8::MAX)
}

/// Entering S5 powers the machine off; nothing else can be entered.
pub(super) struct SleepControl(pub(super) Arc<dyn InterruptLine>);

impl BusDevice for SleepControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // What is written to the status register acknowledges a wake-up; there was none.
        if offset != 0 {
            return;
        }
        let enters =
            |value: u8| value & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_ENABLE | SLEEP_TYPE_S5;
        if data.first().copied().is_some_and(enters)
            && let Err(error) = self.0.trigger()
        {
            tracing::error!("the guest's power-off cannot be signalled: {error}");
        }
    }
}

/// A virtio device's registers.
pub(super) struct VirtioPort(pub(super) Arc<Mutex<MmioTransport>>);

impl BusDevice for VirtioPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
}
