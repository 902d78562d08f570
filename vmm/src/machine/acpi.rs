//! What a machine with `acpi=on` has on top: tables, the event device, the VM generation id.
//! `docs/acpi.md`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::devices::acpi::{Event, EventDevice, EventState, Machine, Tables, VirtioPlace, ged};
use ::devices::{GuestMemory, InterruptLine};
use uuid::Uuid;
use vm_memory::Bytes;

use super::Error;
use super::devices::map::{
    RESET_VALUE, SERIAL_IRQ, SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_TYPE_S5_VALUE, slot_address,
    slot_irq,
};
use super::spec::MachineSpec;
use crate::boot::layout;
use crate::bus::{Bus, BusDevice, Space};

/// First port of the event device's register.
pub const EVENTS_PORT: u64 = 0x608;
/// Interrupt of the event device: the second serial port's, which the machine does not have.
pub const EVENTS_IRQ: u32 = 3;
/// Port of the reset line.
const RESET_PORT: u16 = 0x64;

/// The tables of a machine, if it is to have any.
pub fn tables(spec: &MachineSpec) -> Option<Tables> {
    if !spec.acpi {
        return None;
    }
    let place = |slot| VirtioPlace {
        address: low(slot_address(slot)),
        len: low(layout::MMIO_DEVICE_SIZE),
        irq: slot_irq(slot),
    };
    let virtio: Vec<_> = (0..spec.devices.len()).map(place).collect();
    let machine = Machine {
        vcpus: spec.vcpus,
        lapic: layout::LAPIC_ADDR,
        io_apic: layout::IOAPIC_ADDR,
        serial: (port(SERIAL_PORT), SERIAL_IRQ),
        reset: (RESET_PORT, RESET_VALUE),
        sleep_control: port(SLEEP_CONTROL_PORT),
        sleep_type_s5: SLEEP_TYPE_S5_VALUE,
        events: (port(EVENTS_PORT), EVENTS_IRQ),
        generation: layout::GENERATION_ADDR.0,
        virtio: &virtio,
    };
    Some(Tables::new(&machine, layout::ACPI_ADDR.0))
}

/// An address in the 32-bit hole, or a length there.
fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn port(number: u64) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// Writes the VM generation id to where the tables say it is, as dirty as what a device writes.
///
/// # Errors
/// The page is not there.
pub fn write_id(memory: &GuestMemory, id: Uuid) -> Result<(), Error> {
    // A GUID's first three fields are numbers, in the guest's byte order.
    let bytes = id.to_bytes_le();
    memory.write_slice(&bytes, layout::GENERATION_ADDR).map_err(Error::Generation)
}

/// The event device in its place.
pub struct Events(Arc<Mutex<EventPort>>);

impl Events {
    /// Makes the device and puts it on the bus.
    ///
    /// # Errors
    /// Something is there already.
    pub fn attach(line: Arc<dyn InterruptLine>, bus: &mut Bus) -> Result<Self, Error> {
        let port = Arc::new(Mutex::new(EventPort(EventDevice::new(line))));
        bus.insert(Space::Port, EVENTS_PORT, ged::REGISTER_LEN, port.clone())?;
        Ok(Self(port))
    }

    fn lock(&self) -> MutexGuard<'_, EventPort> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the guest of an event, at the latest when it runs again.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn raise(&self, event: Event) -> Result<(), Error> {
        self.lock().0.raise(event).map_err(Error::EventLine)
    }

    /// The guest is about to run.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn resume(&self) -> Result<(), Error> {
        self.lock().0.resume().map_err(Error::EventLine)
    }

    /// What to save.
    pub fn state(&self) -> EventState {
        self.lock().0.state()
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// There is no such state.
    pub fn restore(&self, state: &EventState) -> Result<(), Error> {
        Ok(self.lock().0.restore(state)?)
    }
}

struct EventPort(EventDevice);

impl BusDevice for EventPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}
