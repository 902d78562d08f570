//! Taking the state of a paused machine, and replacing it by that of a checkpoint.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::devices::acpi::Event;
use kvm_ioctls::VmFd;
use qmp::schema::LoadClock;
use snapshot::{Base, PageSet, Rewinder, Stamp};
use uuid::Uuid;

use super::devices::DeviceSet;
use super::state::MachineState;
use super::wall_clock::WallClocks;
use super::{Error, Machine, acpi};
use crate::kvm::irqchip::{ClockState, IrqchipState};
use crate::memory;
use crate::vcpu::VcpuHandle;

/// Bytes of a checkpoint's header and configuration at most, beside the machine's state.
const STATE_SLACK: u64 = 1 << 20;

impl Machine {
    /// The state of the paused machine, without RAM and disks.
    pub fn capture(&self) -> Result<MachineState, Error> {
        capture(&self.vm, &self.vcpus, &self.devices, self.clock)
    }

    /// Whether a recorded state can be put on this machine. Touches nothing.
    pub fn check_fits(&self, state: &MachineState) -> Result<(), Error> {
        if state.shape() != self.shape() {
            return Err(Error::OtherShape(state.shape(), self.shape()));
        }
        for (index, vcpu) in (0..).zip(&state.vcpus) {
            vcpu.check_fits(&self.info).map_err(|source| Error::VcpuState { index, source })?;
        }
        Ok(())
    }

    /// Replaces the state of the paused machine by that of a checkpoint. RAM must hold that state's memory
    /// already; `base` tells which it is, where saves can be built upon it.
    pub fn restore(&mut self, state: &MachineState, base: Option<Base>) -> Result<(), Error> {
        self.replace(state, base)?;
        self.new_generation()
    }

    /// Sets the guest's clocks forward by the host's time since a save, where that is wanted. The machine has the
    /// state that was saved, and has not run since.
    pub fn set_clock(&mut self, clock: LoadClock, saved: &Stamp) {
        if clock == LoadClock::Host {
            self.clock.kvmclock_ns = self.clock.kvmclock_ns.saturating_add(since(saved));
        }
    }

    /// Has the guest find another VM generation id, and tells it so when it runs.
    fn new_generation(&mut self) -> Result<(), Error> {
        if let Some(events) = self.devices.events() {
            let id = Uuid::new_v4();
            acpi::write_id(&self.memory, id)?;
            events.raise(Event::Generation)?;
            self.generation = Some(id);
        }
        Ok(())
    }

    /// As [`Machine::restore`], for the guest that had this state: its VM generation id stays.
    pub(super) fn replace(
        &mut self,
        state: &MachineState,
        base: Option<Base>,
    ) -> Result<(), Error> {
        self.check_fits(state)?;
        let base = base.filter(|_| self.spec.dirty_tracking);
        self.tracker.forget();
        let logged = base.is_some();
        memory::forget_translations(&self.vm, &self.memory, &mut self.log, logged)?;
        if let Some(base) = base {
            self.tracker.loaded(base);
        }
        self.put(state, |_| Ok(()))
    }

    /// Puts back the pages that were written since the base of RAM. The machine must be paused, and
    /// [`Machine::note_written`] have been called since. After an error RAM is as it was.
    ///
    /// # Errors
    /// As [`Rewinder::put_back`].
    pub fn put_back(&self, rewinder: &mut Rewinder) -> block::Result<()> {
        rewinder.put_back(&self.memory, self.tracker.dirty())
    }

    /// Replaces the state of the paused machine after [`Machine::put_back`]: RAM is that of `base`. If
    /// `unlogged` is given, these parts of RAM are not logged from now on, and no others.
    pub fn restore_rewound(
        &mut self,
        state: &MachineState,
        base: Base,
        unlogged: Option<&PageSet>,
    ) -> Result<(), Error> {
        self.tracker.loaded(base);
        if let Some(unlogged) = unlogged {
            // What was logged is put back. vCPUs and devices write to RAM as they are restored, so that
            // is later.
            memory::forget_and_cut(&self.vm, &self.memory, &mut self.log, unlogged)?;
        }
        let nothing_to_forget = self.nested_paging || unlogged.is_some();
        let forget = |machine: &Self| match nothing_to_forget {
            true => Ok(()),
            false => machine.shadows.forget(),
        };
        self.put(state, forget)?;
        self.new_generation()
    }

    /// vCPUs, interrupt chips, devices and clock. While the vCPUs' threads are at it, which take long,
    /// `meanwhile` is done: something that takes long too.
    fn put(
        &mut self,
        state: &MachineState,
        meanwhile: impl FnOnce(&Self) -> Result<(), memory::Error>,
    ) -> Result<(), Error> {
        // The interrupt chips first: restoring a LAPIC or a device can raise interrupts there.
        state.irqchip.restore(&self.vm)?;
        let wall_clocks = WallClocks::note(&self.memory, state);
        let pairs = self.vcpus.iter().zip(&state.vcpus);
        let pending: Result<Vec<_>, _> = pairs.map(|(vcpu, to)| vcpu.restore(to.clone())).collect();
        meanwhile(self)?;
        for restored in pending? {
            restored.wait()?;
        }
        wall_clocks.put_back(&self.memory);
        // A device's interrupt goes to a LAPIC that is in place.
        self.devices.restore(&state.devices)?;
        self.clock = state.clock;
        Ok(())
    }

    /// Bytes of the state in a checkpoint at most.
    ///
    /// # Errors
    /// The state cannot be stored.
    pub fn most_state_bytes(&self) -> Result<u64, Error> {
        // Numbers take one to nine bytes, and what is many bytes is so before the first instruction.
        let sections = self.pristine.to_sections()?;
        let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
        Ok(STATE_SLACK + 4 * bytes as u64)
    }
}

/// Nanoseconds of the host's time since a save; none if its clock was set back.
fn since(saved: &Stamp) -> u64 {
    let then = Duration::new(saved.date_sec.into(), saved.date_nsec);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_sub(then).as_nanos()).unwrap_or(u64::MAX)
}

/// The state of paused parts.
pub(super) fn capture(
    vm: &VmFd,
    vcpus: &[VcpuHandle],
    devices: &DeviceSet,
    clock: ClockState,
) -> Result<MachineState, Error> {
    Ok(MachineState {
        vcpus: vcpus.iter().map(VcpuHandle::capture).collect::<Result<_, _>>()?,
        irqchip: IrqchipState::capture(vm)?,
        clock,
        devices: devices.capture()?,
    })
}
