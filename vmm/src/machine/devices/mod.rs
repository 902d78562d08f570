//! The machine's devices, and what is done with all of them at once. Where they are: [`map`].

pub mod map;
mod ports;
mod slot;

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::Graph;
use devices::legacy::{I8042, Serial};
use devices::virtio::MmioTransport;
use devices::virtio::block::Failure;
use devices::{EventFdLine, GuestMemory, InterruptLine, Presence};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::acpi::{self, Events};
use super::spec::MachineSpec;
use super::state::DeviceStates;
use crate::bus::{Bus, Space};
use crate::kvm::IoctlContext;
use map::{I8042_PORT, MAX_VIRTIO_DEVICES, SERIAL_IRQ, SERIAL_PORT, SLEEP_CONTROL_PORT};
use ports::{ResetController, SerialPort, SleepControl};
use slot::Board;
pub use slot::VirtioSlot;

/// Where the guest's wishes go.
pub struct GuestSignals {
    /// The reset line of the keyboard controller.
    pub reset: Arc<dyn InterruptLine>,
    /// The power-off register.
    pub power_off: Arc<dyn InterruptLine>,
    /// Requests that fail on the host, with the slot of their disk.
    pub disk: Arc<dyn Fn(usize, Failure) + Send + Sync>,
}

/// All devices of a machine.
pub struct DeviceSet {
    serial: Arc<Mutex<SerialPort>>,
    i8042: Arc<Mutex<ResetController>>,
    virtio: Vec<VirtioSlot>,
    events: Option<Events>,
    wants_input: EventFd,
    presence: Presence,
}

impl DeviceSet {
    /// Makes the devices and connects them to the bus and to KVM.
    ///
    /// # Errors
    /// A node is missing or used twice, there are too many devices, or the host refuses.
    pub fn attach(
        spec: &MachineSpec,
        vm: &VmFd,
        memory: &GuestMemory,
        bus: &mut Bus,
        graph: &Graph,
        console: Box<dyn Write + Send>,
        signals: GuestSignals,
    ) -> Result<Self, Error> {
        if spec.devices.len() > MAX_VIRTIO_DEVICES {
            return Err(Error::TooManyDevices(spec.devices.len()));
        }
        let wants_input = event_fd("serial")?;
        let line = irq_line(vm, "serial", SERIAL_IRQ)?;
        let room = wants_input.try_clone().map_err(|source| fd_error("serial", source))?;
        let serial = Arc::new(Mutex::new(SerialPort(Serial::new(line, console, Some(room)))));
        bus.insert(Space::Port, SERIAL_PORT, 8, serial.clone())?;
        let i8042 = Arc::new(Mutex::new(ResetController(I8042::new(signals.reset))));
        bus.insert(Space::Port, I8042_PORT, 5, i8042.clone())?;
        let sleep = Arc::new(Mutex::new(SleepControl(signals.power_off)));
        // The status register behind it always reads as zero: nothing wakes up.
        bus.insert(Space::Port, SLEEP_CONTROL_PORT, if spec.acpi { 2 } else { 1 }, sleep)?;
        let events = match spec.acpi {
            true => Some(Events::attach(irq_line(vm, "ACPI events", acpi::EVENTS_IRQ)?, bus)?),
            false => None,
        };

        let presence = Presence::default();
        let board = Board { vm, memory, graph, presence: &presence, failures: &signals.disk };
        let mut virtio = Vec::with_capacity(spec.devices.len());
        for spec in &spec.devices {
            virtio.push(VirtioSlot::attach(spec, &virtio, &board, bus)?);
        }
        Ok(Self { serial, i8042, virtio, events, wants_input, presence })
    }

    /// The virtio devices by slot.
    pub fn virtio(&self) -> impl Iterator<Item = &VirtioSlot> {
        self.virtio.iter()
    }

    /// The event device, of a machine with ACPI.
    pub fn events(&self) -> Option<&Events> {
        self.events.as_ref()
    }

    /// How many virtio devices there are.
    pub fn virtio_count(&self) -> usize {
        self.virtio.len()
    }

    /// Tells the devices whether pages of guest memory may be missing.
    pub fn presence(&self) -> &Presence {
        &self.presence
    }

    /// Bytes of input the console takes now.
    pub fn console_room(&self) -> usize {
        self.serial().0.input_room()
    }

    /// Gives the console input, at most [`DeviceSet::console_room`] bytes.
    pub fn console_input(&self, bytes: &[u8]) {
        self.serial().0.enqueue_input(bytes);
    }

    /// Readable when the console has room again after it had none.
    pub fn console_wants_input(&self) -> &EventFd {
        &self.wants_input
    }

    /// Takes that signal back.
    pub fn acknowledge_console_wants_input(&self) {
        // Fails where nothing was signalled, after a spurious wake-up.
        let _ = self.wants_input.read();
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn i8042(&self) -> MutexGuard<'_, ResetController> {
        self.i8042.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drains every device; the vCPUs must be stopped.
    pub fn pause(&self) -> Result<(), Error> {
        self.each(|transport| transport.pause())
    }

    /// Lets every device go on.
    pub fn resume(&self) -> Result<(), Error> {
        if let Some(events) = &self.events {
            events.resume()?;
        }
        self.begin_round();
        self.each(|transport| transport.resume())
    }

    /// Lets requests that failed be done again, of devices that were not paused.
    pub fn retry(&self) -> Result<(), Error> {
        self.begin_round();
        self.each(|transport| transport.retry())
    }

    fn begin_round(&self) {
        self.virtio.iter().filter_map(|slot| slot.errors.as_ref()).for_each(|e| e.begin_round());
    }

    /// Tells the guest of disks that have another size.
    pub fn refresh_config(&self) {
        self.virtio.iter().for_each(|slot| slot.lock().refresh_config());
    }

    /// The state of the paused devices.
    pub fn capture(&self) -> Result<DeviceStates, Error> {
        let mut virtio = Vec::with_capacity(self.virtio.len());
        self.each(|transport| transport.state().map(|state| virtio.push(state)))?;
        Ok(DeviceStates {
            serial: self.serial().0.state(),
            i8042: self.i8042().0.state(),
            virtio,
            events: self.events.as_ref().map(Events::state),
        })
    }

    /// Replaces the state of the paused devices.
    pub fn restore(&self, states: &DeviceStates) -> Result<(), Error> {
        self.serial().0.restore(&states.serial)?;
        self.i8042().0.restore(&states.i8042);
        // The shape was compared before.
        if let (Some(events), Some(state)) = (&self.events, &states.events) {
            events.restore(state)?;
        }
        let mut states = states.virtio.iter();
        self.each(|transport| match states.next() {
            Some(state) => transport.restore(state),
            // The shape was compared before.
            None => Ok(()),
        })
    }

    /// Stops the devices' threads and makes the disks durable. All are tried; the first error is
    /// told.
    pub fn shutdown(&self) -> Result<(), Error> {
        let mut outcome: devices::virtio::Result<()> = Ok(());
        for slot in &self.virtio {
            outcome = outcome.and(slot.lock().shutdown());
        }
        Ok(outcome?)
    }

    fn each(
        &self,
        mut action: impl FnMut(&mut MmioTransport) -> devices::virtio::Result<()>,
    ) -> Result<(), Error> {
        for slot in &self.virtio {
            action(&mut slot.lock())?;
        }
        Ok(())
    }
}

fn irq_line(vm: &VmFd, name: &str, irq: u32) -> Result<Arc<EventFdLine>, Error> {
    let line = EventFdLine::new().map_err(|source| fd_error(name, source))?;
    vm.register_irqfd(line.event_fd(), irq).ioctl("KVM_IRQFD")?;
    Ok(Arc::new(line))
}

fn event_fd(name: &str) -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| fd_error(name, source))
}

fn fd_error(name: &str, source: std::io::Error) -> Error {
    Error::EventFd { name: name.to_owned(), source }
}
