//! The kernel and the state a guest starts with.

use super::devices::map::extend_cmdline;
use super::spec::MachineSpec;
use super::{Error, Machine, acpi};
use crate::boot::{self, Boot, BootSpec};
use crate::memory;

/// Reads and decompresses the kernel of `spec` and checks that it fits. Needs no machine, so it can
/// be done while one is made.
///
/// # Errors
/// There is no kernel, or it cannot be booted.
pub fn prepare_boot(spec: &MachineSpec) -> Result<Boot, Error> {
    let kernel = spec.kernel.as_deref().ok_or(Error::NoKernel)?;
    // Devices that are in the tables would be found twice.
    let unlisted = if spec.acpi { 0 } else { spec.devices.len() };
    let tables = acpi::tables(spec);
    let boot_spec = BootSpec {
        kernel,
        initrd: spec.initrd.as_deref(),
        cmdline: &extend_cmdline(&spec.cmdline, unlisted),
        vcpus: spec.vcpus,
        acpi: tables.as_ref(),
    };
    Ok(Boot::prepare(&boot_spec, spec.ram_bytes)?)
}

impl Machine {
    /// Puts a prepared kernel in memory and vCPU 0 at its entry; everything else is as at power-on.
    /// The machine must be paused.
    ///
    /// # Errors
    /// It does not load; the machine must not be run then.
    pub fn boot(&mut self, prepared: Boot) -> Result<(), Error> {
        self.tracker.forget();
        self.forget_missing();
        // What an earlier boot left must not be there: the loader writes no zeroes.
        memory::discard(&self.memory)?;
        let info = prepared.load(&self.memory)?;
        if let Some(id) = self.generation {
            acpi::write_id(&self.memory, id)?;
        }
        let mut state = self.pristine.clone();
        state.clock = self.clock;
        if let Some(first) = state.vcpus.first_mut() {
            let entry = boot::initial_registers(&info, *first.sregs_mut());
            *first.regs_mut() = entry.regs;
            *first.sregs_mut() = entry.sregs;
        }
        self.replace(&state, None)
    }
}
