//! The machine: vCPUs, memory, devices, and the whole of their state.
//!
//! The machine is owned by the main thread. vCPUs and disks have threads of their own that it
//! commands over channels, so there is no lock around the machine.
//!
//! [`Machine::new`] is in `build`, loading a kernel in `boot`, stopping and going on in `pause`, taking and
//! replacing the state in `restore`, what the guest has written in `tracking`.

pub mod acpi;
mod boot;
mod build;
pub mod devices;
pub mod error;
pub mod missing;
mod pause;
pub mod recorded;
mod restore;
pub mod spec;
pub mod state;
mod tracking;
mod wall_clock;

use std::sync::Arc;

use ::devices::GuestMemory;
use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use snapshot::{Orders, PageSet, Tracker};
use uuid::Uuid;

use crate::kvm::irqchip::ClockState;
use crate::kvm::vcpu_state::CaptureInfo;
use crate::memory::dirty_log::DirtyLog;
use crate::memory::shadows::Shadows;
use crate::vcpu::VcpuHandle;
pub use boot::prepare_boot;
use devices::DeviceSet;
pub use error::Error;
use missing::Missing;
use spec::MachineSpec;
use state::{MachineState, Shape};

/// A virtual machine.
pub struct Machine {
    // Fields are dropped in this order: vCPUs stop before devices, devices before the VM and its
    // memory.
    vcpus: Vec<VcpuHandle>,
    devices: DeviceSet,
    vm: Arc<VmFd>,
    memory: GuestMemory,
    log: DirtyLog,
    shadows: Arc<Shadows>,
    tracker: Tracker,
    /// Room for a collection of the log.
    written: PageSet,
    spec: MachineSpec,
    cpuid: CpuId,
    info: Arc<CaptureInfo>,
    /// State of the machine before its first instruction, which is what a reset goes back to.
    pristine: MachineState,
    /// The guest's clock while paused; the host's clock does not count it then.
    clock: ClockState,
    /// KVM has no shadow of the guest's page tables.
    nested_paging: bool,
    /// The VM generation id, of a machine with ACPI.
    generation: Option<Uuid>,
    /// RAM that is still in an image.
    missing: Option<Arc<Missing>>,
    /// What guests touched first after loads.
    orders: Arc<Orders>,
    /// The vCPUs were told to stop, and those that can have; see [`Machine::halt`].
    halted: bool,
}

impl Machine {
    /// How many parts the machine has.
    pub fn shape(&self) -> Shape {
        let acpi = self.devices.events().is_some();
        Shape { vcpus: self.vcpus.len(), virtio: self.devices.virtio_count(), acpi }
    }

    /// What the machine is made of.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What KVM derives from RAM.
    pub fn shadows(&self) -> &Arc<Shadows> {
        &self.shadows
    }

    /// What guests touched first after loads, kept as long as the machine.
    pub fn orders(&self) -> &Arc<Orders> {
        &self.orders
    }

    /// The guest's devices.
    pub fn devices(&self) -> &DeviceSet {
        &self.devices
    }

    /// What the first vCPU is told.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The vCPUs, by index.
    pub fn vcpus(&self) -> &[VcpuHandle] {
        &self.vcpus
    }

    /// Nanoseconds the guest has been running; valid while paused.
    pub fn clock(&self) -> ClockState {
        self.clock
    }

    /// The VM generation id, of a machine with ACPI.
    pub fn generation(&self) -> Option<Uuid> {
        self.generation
    }

    /// Stops everything and makes the disks durable.
    ///
    /// # Errors
    /// A disk could not be flushed; the rest is stopped all the same.
    pub fn shutdown(mut self) -> Result<(), Error> {
        if let Some(missing) = &self.missing {
            missing.ram.forfeit();
        }
        self.vcpus.clear();
        let outcome = self.devices.shutdown();
        self.forget_missing();
        outcome
    }
}
