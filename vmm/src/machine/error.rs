//! What can go wrong with a machine.

use super::state::Shape;
use crate::{boot, bus, kvm, memory, vcpu};

/// Why a machine could not be built, run, or put in a state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The state of the machine cannot be stored.
    #[error(transparent)]
    State(#[from] snapshot::FormatError),
    /// There is no guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel does not load.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A vCPU thread failed.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// Two devices at one address, which only a bug can cause.
    #[error(transparent)]
    Bus(#[from] bus::Overlap),
    /// There is nothing to boot.
    #[error("this machine was revived without --kernel, so it cannot boot again")]
    NoKernel,
    /// A disk's node is not there, or in use.
    #[error("--device virtio-blk-device,drive={drive}: {source}")]
    Drive {
        /// The node's name.
        drive: String,
        /// Why it cannot be used.
        source: block::Error,
    },
    /// More devices than there are interrupt lines.
    #[error("{0} virtio devices are too many: the machine has {max} slots", max = super::devices::map::MAX_VIRTIO_DEVICES)]
    TooManyDevices(usize),
    /// A virtio device failed, or a state does not fit it.
    #[error(transparent)]
    Device(#[from] ::devices::virtio::Error),
    /// A disk's options are not possible.
    #[error(transparent)]
    DeviceOptions(#[from] ::devices::virtio::block::OptionsError),
    /// A state does not fit the console.
    #[error("serial console: {0}")]
    Serial(#[from] ::devices::legacy::SerialError),
    /// A state does not fit the event device.
    #[error("ACPI event device: {0}")]
    Events(#[from] ::devices::acpi::ged::UnknownEvents),
    /// An event of the machine cannot be told.
    #[error("ACPI event device: the interrupt cannot be raised: {0}")]
    EventLine(std::io::Error),
    /// The VM generation id cannot be written to guest memory.
    #[error("the VM generation id cannot be written: {0}")]
    Generation(vm_memory::GuestMemoryError),
    /// The host is out of event descriptors.
    #[error("device {name}: cannot make an event descriptor: {source}")]
    EventFd {
        /// The device's name.
        name: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// A vCPU waits for a page that cannot be read. It will run no further before it has it.
    #[error("the guest waits for memory that cannot be read: {0}")]
    Missing(String),
    /// Guest memory could not be read and was given up.
    #[error("the guest's memory is lost: {0}")]
    Lost(String),
    /// A recorded state is of a machine with other parts.
    #[error("the recorded state is of a machine with {0}, this one has {1}")]
    OtherShape(Shape, Shape),
    /// The recorded state of a vCPU does not fit.
    #[error("vCPU {index}: {source}")]
    VcpuState {
        /// Which vCPU.
        index: u8,
        /// What does not fit.
        source: kvm::Error,
    },
}
