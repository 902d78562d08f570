//! The state of a machine without RAM and disks, and its form in a checkpoint: one section a part.

use std::fmt;

use ::devices::acpi::EventState;
use ::devices::legacy::{I8042State, SerialState};
use ::devices::virtio::MmioState;
use snapshot::format::FormatError;
use snapshot::{Section, SectionReader};

use crate::kvm::irqchip::{ClockState, IrqchipState};
use crate::kvm::vcpu_state::VcpuState;

/// Section kinds. The vCPUs have their index as instance, virtio devices their slot.
const VCPU: &str = "vcpu";
const IRQCHIP: &str = "irqchip";
const CLOCK: &str = "clock";
const SERIAL: &str = "serial";
const I8042: &str = "i8042";
const VIRTIO: &str = "virtio-mmio";
const EVENTS: &str = "acpi-events";

/// Everything but RAM and disks.
#[derive(Clone)]
pub struct MachineState {
    /// By index.
    pub vcpus: Vec<VcpuState>,
    /// PICs, IOAPIC, PIT.
    pub irqchip: IrqchipState,
    /// The guest's monotonic clock.
    pub clock: ClockState,
    /// The devices.
    pub devices: DeviceStates,
}

/// The state of every device.
#[derive(Clone)]
pub struct DeviceStates {
    /// The console.
    pub serial: SerialState,
    /// The keyboard controller, of which only the reset line is there.
    pub i8042: I8042State,
    /// virtio devices by slot.
    pub virtio: Vec<MmioState>,
    /// The event device, of a machine with ACPI.
    pub events: Option<EventState>,
}

impl MachineState {
    /// The sections of a checkpoint.
    ///
    /// # Errors
    /// A part is larger than the format takes.
    pub fn to_sections(&self) -> Result<Vec<Section>, FormatError> {
        let mut sections = Vec::new();
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            sections.push(Section::encode(VCPU, index, VcpuState::VERSION, vcpu)?);
        }
        sections.push(Section::encode(IRQCHIP, 0, IrqchipState::VERSION, &self.irqchip)?);
        sections.push(Section::encode(CLOCK, 0, ClockState::VERSION, &self.clock)?);
        let devices = &self.devices;
        sections.push(Section::encode(SERIAL, 0, SerialState::VERSION, &devices.serial)?);
        sections.push(Section::encode(I8042, 0, I8042State::VERSION, &devices.i8042)?);
        for (slot, device) in (0..).zip(&devices.virtio) {
            sections.push(Section::encode(VIRTIO, slot, device.version(), device)?);
        }
        if let Some(events) = &devices.events {
            sections.push(Section::encode(EVENTS, 0, EventState::VERSION, events)?);
        }
        Ok(sections)
    }
}

/// How many parts a machine has; a state fits only a machine of the same shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Number of virtio devices.
    pub virtio: usize,
    /// Whether there is ACPI.
    pub acpi: bool,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let acpi = if self.acpi { "with ACPI" } else { "without ACPI" };
        write!(f, "{} vCPUs and {} virtio devices, {acpi}", self.vcpus, self.virtio)
    }
}

impl MachineState {
    /// Reads the sections of a checkpoint of a machine of `shape`. All must be there, and no more.
    ///
    /// # Errors
    /// Names the section that is missing, unknown, of an unknown version or damaged.
    pub fn from_sections(
        mut sections: SectionReader<'_>,
        shape: Shape,
    ) -> Result<Self, FormatError> {
        let vcpus = (0..)
            .take(shape.vcpus)
            .map(|index| sections.take(VCPU, index, 1..=VcpuState::VERSION))
            .collect::<Result<_, _>>()?;
        let state = Self {
            vcpus,
            irqchip: sections.take(IRQCHIP, 0, 1..=IrqchipState::VERSION)?,
            clock: sections.take(CLOCK, 0, 1..=ClockState::VERSION)?,
            devices: DeviceStates {
                serial: sections.take(SERIAL, 0, 1..=SerialState::VERSION)?,
                i8042: sections.take(I8042, 0, 1..=I8042State::VERSION)?,
                virtio: (0..)
                    .take(shape.virtio)
                    .map(|slot| sections.take(VIRTIO, slot, 1..=MmioState::VERSION))
                    .collect::<Result<_, _>>()?,
                events: match shape.acpi {
                    true => Some(sections.take(EVENTS, 0, 1..=EventState::VERSION)?),
                    false => None,
                },
            },
        };
        sections.finish()?;
        Ok(state)
    }

    /// The shape of the machine this is the state of.
    pub fn shape(&self) -> Shape {
        Shape {
            vcpus: self.vcpus.len(),
            virtio: self.devices.virtio.len(),
            acpi: self.devices.events.is_some(),
        }
    }
}
