//! The machine's devices: where they are, and what is done with all of them at once.
//!
//! | device | where | interrupt |
//! |---|---|---|
//! | serial console (16550) | ports 0x3f8 to 0x3ff | 4 |
//! | i8042, reset line only | ports 0x60 to 0x64 | - |
//! | sleep control register, power-off only | port 0x600 | - |
//! | sleep status register, event device: with ACPI | port 0x601, ports 0x608 to 0x60b | -, 3 |
//! | virtio-mmio, by slot | 4 KiB each from `boot::layout::MMIO_START` | from 5 |

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Attachment, Graph, Link, Node, User};
use devices::legacy::{I8042, Serial};
use devices::virtio::block::{Failure, IoCounters, IoErrors, IoThrottle, OptionsError};
use devices::virtio::{BlockDevice, BlockOptions, MmioTransport, RngDevice, VirtioDevice};
use devices::{EventFdLine, GuestMemory, InterruptLine, Presence};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::acpi::{self, Events};
use super::spec::{DeviceKind, DeviceSpec, MachineSpec};
use super::state::DeviceStates;
use crate::boot::{IOAPIC_PINS, layout};
use crate::bus::{Bus, BusDevice, Space};
use crate::kvm::IoctlContext;

/// First port of the console.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Interrupt of the console.
pub const SERIAL_IRQ: u32 = 4;
/// First port of the keyboard controller.
pub const I8042_PORT: u64 = 0x60;
/// ACPI's SLEEP_CONTROL register of hardware-reduced machines (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u64 = 0x600;
/// SLP_EN, and SLP_TYP in bits 4:2 of that register.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 0b111 << 2;
/// The sleep type that means power-off here.
pub const SLEEP_TYPE_S5_VALUE: u8 = 5;
const SLEEP_TYPE_S5: u8 = SLEEP_TYPE_S5_VALUE << 2;
/// What pulls the reset line when it is written to port 0x64.
pub const RESET_VALUE: u8 = 0xfe;
/// Interrupt of the first virtio device; those below belong to the PC's own devices.
const FIRST_VIRTIO_IRQ: u32 = 5;
/// As many as there are IOAPIC pins left.
pub const MAX_VIRTIO_DEVICES: usize = (IOAPIC_PINS as u32 - FIRST_VIRTIO_IRQ) as usize;
/// Register that a driver writes to notify a queue (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// Where the guest's wishes go.
pub struct GuestSignals {
    /// The reset line of the keyboard controller.
    pub reset: Arc<dyn InterruptLine>,
    /// The power-off register.
    pub power_off: Arc<dyn InterruptLine>,
    /// Requests that fail on the host, with the slot of their disk.
    pub disk: Arc<dyn Fn(usize, Failure) + Send + Sync>,
}

/// A virtio device in its place.
pub struct VirtioSlot {
    /// What the user asked for.
    pub spec: DeviceSpec,
    /// Guest physical address of its registers.
    pub address: u64,
    /// Its interrupt line.
    pub irq: u32,
    /// Its id, or its path where it has none, as in QEMU.
    pub path: String,
    /// Keeps the node from being used by anyone else.
    disk: Option<Attachment>,
    /// Its place in QEMU's tree of objects.
    pub qom_path: String,
    /// What its requests come to, where it is a disk.
    pub counters: Option<Arc<IoCounters>>,
    /// What failed on the host, where it is a disk.
    pub errors: Option<Arc<IoErrors>>,
    /// Its limits, where it is a disk.
    pub throttle: Option<Arc<IoThrottle>>,
    transport: Arc<Mutex<MmioTransport>>,
}

impl VirtioSlot {
    /// The node as it is now and the serial, where it is a disk.
    pub fn disk(&self) -> Option<(Arc<Node>, &str)> {
        match (&self.spec.kind, &self.disk) {
            (DeviceKind::Block { serial, .. }, Some(disk)) => Some((disk.node(), serial)),
            _ => None,
        }
    }

    /// Has the device look again whether it may go on.
    pub fn look(&self) -> Result<(), Error> {
        Ok(self.lock().look()?)
    }

    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        let mut set = Self { serial, i8042, virtio: Vec::new(), events, wants_input, presence };
        for spec in &spec.devices {
            set.attach_virtio(spec, vm, memory, bus, graph, &signals.disk)?;
        }
        Ok(set)
    }

    fn attach_virtio(
        &mut self,
        spec: &DeviceSpec,
        vm: &VmFd,
        memory: &GuestMemory,
        bus: &mut Bus,
        graph: &Graph,
        failures: &Arc<dyn Fn(usize, Failure) + Send + Sync>,
    ) -> Result<(), Error> {
        let index = self.virtio.len();
        let (address, irq) = (slot_address(index), slot_irq(index));
        let name = spec.id.clone().unwrap_or_else(|| format!("virtio{index}"));
        let path = device_path(spec, &self.virtio);
        let disk = match &spec.kind {
            DeviceKind::Block { drive, share_rw, .. } => {
                Some(attach_node(graph, drive, &path, *share_rw)?)
            }
            DeviceKind::Rng => None,
        };
        let link = disk.as_ref().map(Attachment::link);
        let failures = Arc::clone(failures);
        let errors = match &spec.kind {
            DeviceKind::Block { on_error, .. } => {
                let sink = Box::new(move |failure| failures(index, failure));
                Some(Arc::new(IoErrors::new(*on_error, sink)))
            }
            DeviceKind::Rng => None,
        };
        let parts = (link, errors.as_ref());
        let (device, seen) = make_device(&spec.kind, &name, parts, &self.presence)?;
        let (counters, throttle) = seen.unzip();
        let line = irq_line(vm, &name, irq)?;
        let transport = MmioTransport::new(device, memory.clone(), line)?;
        for (queue, fd) in (0u32..).zip(transport.queue_notify_fds()) {
            let register = IoEventAddress::Mmio(address + QUEUE_NOTIFY);
            vm.register_ioevent(fd, &register, queue).ioctl("KVM_IOEVENTFD")?;
        }
        let transport = Arc::new(Mutex::new(transport));
        let port = Arc::new(Mutex::new(VirtioPort(Arc::clone(&transport))));
        bus.insert(Space::Mmio, address, layout::MMIO_DEVICE_SIZE, port)?;
        let qom_path = match &spec.id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => path.clone(),
        };
        let spec = spec.clone();
        self.virtio.push(VirtioSlot {
            spec,
            address,
            irq,
            path,
            qom_path,
            disk,
            counters,
            errors,
            throttle,
            transport,
        });
        Ok(())
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
        // Empty if it was woken for nothing.
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

/// The kernel command line with what tells Linux of the virtio devices. What follows a lone `--`
/// is for init, so they go before it.
pub fn extend_cmdline(cmdline: &str, devices: usize) -> String {
    let size = layout::MMIO_DEVICE_SIZE >> 10;
    let parameter =
        |slot| format!("virtio_mmio.device={size}K@{:#x}:{}", slot_address(slot), slot_irq(slot));
    let parameters = (0..devices).map(parameter).collect::<Vec<_>>().join(" ");
    let (kernel, init) = match cmdline.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => match cmdline.strip_prefix("-- ") {
            Some(init) => ("", Some(init)),
            None => (cmdline, None),
        },
    };
    let init = init.map(|init| format!("-- {init}")).unwrap_or_default();
    let parts = [kernel, &parameters, &init];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// How a device is called: by its id, or by its place among those without one.
fn device_path(spec: &DeviceSpec, others: &[VirtioSlot]) -> String {
    spec.id.clone().unwrap_or_else(|| {
        let index = others.iter().filter(|slot| slot.spec.id.is_none()).count();
        format!("/machine/peripheral-anon/device[{index}]")
    })
}

/// The node named `drive`, for this device alone. A read-only node is a read-only disk.
fn attach_node(
    graph: &Graph,
    drive: &str,
    device: &str,
    share_rw: bool,
) -> Result<Attachment, Error> {
    let writable = graph.get(drive).is_some_and(|node| !node.read_only());
    graph
        .attach(drive, User::device(device, writable, share_rw))
        .map_err(|source| Error::Drive { drive: drive.to_owned(), source })
}

/// A device, and its counters and limits if it is a disk.
type Made = (Box<dyn VirtioDevice>, Option<(Arc<IoCounters>, Arc<IoThrottle>)>);

fn make_device(
    kind: &DeviceKind,
    name: &str,
    disk: (Option<&Link>, Option<&Arc<IoErrors>>),
    presence: &Presence,
) -> Result<Made, OptionsError> {
    match (kind, disk) {
        (DeviceKind::Block { serial, queues, .. }, (Some(link), Some(errors))) => {
            let options = BlockOptions { serial: serial.clone(), num_queues: *queues };
            let device = BlockDevice::new(link.clone(), options)?
                .with_presence(presence.clone())
                .with_errors(Arc::clone(errors));
            let seen = (Arc::clone(device.counters()), Arc::clone(device.throttle()));
            Ok((Box::new(device), Some(seen)))
        }
        _ => Ok((Box::new(RngDevice::new(name)), None)),
    }
}

/// Guest physical address of a slot's registers.
pub fn slot_address(index: usize) -> u64 {
    layout::MMIO_START.0 + index as u64 * layout::MMIO_DEVICE_SIZE
}

/// Interrupt of a slot.
pub fn slot_irq(index: usize) -> u32 {
    // At most MAX_VIRTIO_DEVICES.
    FIRST_VIRTIO_IRQ + u32::try_from(index).unwrap_or(0)
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

/// The console on the bus: byte registers, so a string instruction's bytes all go to one register.
struct SerialPort(Serial);

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

struct ResetController(I8042);

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
struct SleepControl(Arc<dyn InterruptLine>);

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
struct VirtioPort(Arc<Mutex<MmioTransport>>);

impl BusDevice for VirtioPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_before_what_is_for_init() {
        let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(extend_cmdline("", 2), devices);
        assert_eq!(extend_cmdline("quiet -- shell", 2), format!("quiet {devices} -- shell"));
        assert_eq!(extend_cmdline("-- shell", 2), format!("{devices} -- shell"));
        assert_eq!(extend_cmdline("a=\"b  c\"", 0), "a=\"b  c\"");
    }
}
