//! State of the interrupt chips, the timer and the clock that KVM keeps for a VM.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::{IoctlContext, Result, blob};

/// Both PICs, the IOAPIC and the PIT.
#[derive(Clone, Serialize, Deserialize)]
pub struct IrqchipState {
    #[serde(with = "blob")]
    pic_master: kvm_irqchip,
    #[serde(with = "blob")]
    pic_slave: kvm_irqchip,
    #[serde(with = "blob")]
    ioapic: kvm_irqchip,
    #[serde(with = "blob")]
    pit: kvm_pit_state2,
}

impl IrqchipState {
    /// Version of this layout in a VM state.
    pub const VERSION: u32 = 1;

    /// Reads the chips of a VM whose vCPUs are stopped.
    pub fn capture(vm: &VmFd) -> Result<Self> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).ioctl("KVM_GET_IRQCHIP")?;
            Ok(chip)
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().ioctl("KVM_GET_PIT2")?,
        })
    }

    /// Puts the chips back; the vCPUs must be stopped.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        vm.set_pit2(&self.pit).ioctl("KVM_SET_PIT2")?;
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(chip).ioctl("KVM_SET_IRQCHIP")?;
        }
        Ok(())
    }
}

/// Makes the in-kernel PICs, IOAPIC and PIT. Must come before the first vCPU (KVM API 4.24).
pub fn create(vm: &VmFd) -> Result<()> {
    vm.create_irq_chip().ioctl("KVM_CREATE_IRQCHIP")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).ioctl("KVM_CREATE_PIT2")
}

/// The guest's monotonic clock (kvmclock): nanoseconds the guest has been running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds since the machine started, without the time it was paused.
    pub kvmclock_ns: u64,
}

impl ClockState {
    /// Version of this layout in a VM state.
    pub const VERSION: u32 = 1;

    /// Reads the clock.
    pub fn capture(vm: &VmFd) -> Result<Self> {
        Ok(Self { kvmclock_ns: vm.get_clock().ioctl("KVM_GET_CLOCK")?.clock })
    }

    /// Sets the clock, which then runs on from that value. To be called right before the vCPUs
    /// run, so that the guest sees no jump.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        let data = kvm_clock_data { clock: self.kvmclock_ns, ..Default::default() };
        vm.set_clock(&data).ioctl("KVM_SET_CLOCK")
    }
}
