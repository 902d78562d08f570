//! Virtio devices in their slots.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Attachment, Graph, Node, User};
use devices::virtio::block::{Failure, IoCounters, IoErrors, IoThrottle};
use devices::virtio::mmio::QUEUE_NOTIFY_OFFSET;
use devices::virtio::{BlockDevice, BlockOptions, MmioTransport, RngDevice, VirtioDevice};
use devices::{GuestMemory, Presence};
use kvm_ioctls::{IoEventAddress, VmFd};

use super::irq_line;
use super::map::{slot_address, slot_irq};
use super::ports::VirtioPort;
use crate::boot::layout;
use crate::bus::{Bus, Space};
use crate::kvm::IoctlContext;
use crate::machine::Error;
use crate::machine::spec::{DeviceKind, DeviceSpec};

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

    pub(super) fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What virtio devices are connected to.
pub(super) struct Board<'a> {
    pub vm: &'a VmFd,
    pub memory: &'a GuestMemory,
    pub graph: &'a Graph,
    pub presence: &'a Presence,
    /// Told of the requests that fail on the host, with the slot of their disk.
    pub failures: &'a Arc<dyn Fn(usize, Failure) + Send + Sync>,
}

impl VirtioSlot {
    /// Makes a device and puts it in the slot behind the `others`.
    pub(super) fn attach(
        spec: &DeviceSpec,
        others: &[Self],
        board: &Board<'_>,
        bus: &mut Bus,
    ) -> Result<Self, Error> {
        let index = others.len();
        let (address, irq) = (slot_address(index), slot_irq(index));
        let name = spec.id.clone().unwrap_or_else(|| format!("virtio{index}"));
        let path = device_path(spec, others);
        let Made { device, disk, counters, errors, throttle } =
            make_device(&spec.kind, &name, &path, index, board)?;
        let line = irq_line(board.vm, &name, irq)?;
        let transport = MmioTransport::new(device, board.memory.clone(), line)?;
        for (queue, fd) in (0u32..).zip(transport.queue_notify_fds()) {
            let register = IoEventAddress::Mmio(address + QUEUE_NOTIFY_OFFSET);
            board.vm.register_ioevent(fd, &register, queue).ioctl("KVM_IOEVENTFD")?;
        }
        let transport = Arc::new(Mutex::new(transport));
        let port = Arc::new(Mutex::new(VirtioPort(Arc::clone(&transport))));
        bus.insert(Space::Mmio, address, layout::MMIO_DEVICE_SIZE, port)?;
        let qom_path = match &spec.id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => path.clone(),
        };
        let spec = spec.clone();
        Ok(Self { spec, address, irq, path, disk, qom_path, counters, errors, throttle, transport })
    }
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

/// A device, and what is kept of it where it is a disk.
struct Made {
    device: Box<dyn VirtioDevice>,
    disk: Option<Attachment>,
    counters: Option<Arc<IoCounters>>,
    errors: Option<Arc<IoErrors>>,
    throttle: Option<Arc<IoThrottle>>,
}

fn make_device(
    kind: &DeviceKind,
    name: &str,
    path: &str,
    slot: usize,
    board: &Board<'_>,
) -> Result<Made, Error> {
    let DeviceKind::Block { drive, serial, queues, share_rw, on_error } = kind else {
        let device = Box::new(RngDevice::new(name));
        return Ok(Made { device, disk: None, counters: None, errors: None, throttle: None });
    };
    let disk = attach_node(board.graph, drive, path, *share_rw)?;
    let failures = Arc::clone(board.failures);
    let sink = Box::new(move |failure| failures(slot, failure));
    let errors = Arc::new(IoErrors::new(*on_error, sink));
    let options = BlockOptions { serial: serial.clone(), num_queues: *queues };
    let device = BlockDevice::new(disk.link().clone(), options)?
        .with_presence(board.presence.clone())
        .with_errors(Arc::clone(&errors));
    Ok(Made {
        counters: Some(Arc::clone(device.counters())),
        throttle: Some(Arc::clone(device.throttle())),
        device: Box::new(device),
        disk: Some(disk),
        errors: Some(errors),
    })
}
