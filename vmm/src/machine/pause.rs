//! Stopping the guest and letting it go on.
//!
//! Pausing stops the vCPUs first, then drains the devices: a device gets no new requests from a
//! stopped vCPU. Resuming goes the other way round. State is captured and restored only in between,
//! when nothing moves.

use std::time::Duration;

use super::{Error, Machine};
use crate::kvm::irqchip::ClockState;
use crate::vcpu::VcpuHandle;

/// How long a vCPU may take to stop before it is looked whether it can.
const PAUSE_LOOK: Duration = Duration::from_millis(20);

impl Machine {
    /// Lets the guest run.
    pub fn resume(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.halted) {
            if let Some(missing) = &self.missing {
                missing.ram.retry();
            }
            self.devices.retry()?;
        } else {
            self.devices.resume()?;
        }
        // As late as can be: from here on the guest's clock runs.
        self.clock.restore(&self.vm)?;
        for vcpu in &self.vcpus {
            vcpu.notify_paused()?;
        }
        for vcpu in &self.vcpus {
            vcpu.resume()?;
        }
        Ok(())
    }

    /// Stops the guest: no instruction, no disk request, no interrupt is under way afterwards.
    ///
    /// # Errors
    /// With [`Error::Missing`] the guest is halted; see [`Machine::halt`].
    pub fn pause(&mut self) -> Result<(), Error> {
        let pending = self.vcpus.iter().map(VcpuHandle::pause).collect::<Result<Vec<_>, _>>()?;
        let mut stopped = Ok(());
        for pause in pending {
            // A vCPU that KVM's own access to a page holds up does not come before the page does.
            while stopped.is_ok() && !pause.wait_for(PAUSE_LOOK)? {
                stopped = self.check_missing();
            }
        }
        let stopped = stopped.and_then(|()| self.check_missing());
        if !std::mem::replace(&mut self.halted, stopped.is_err()) {
            self.clock = ClockState::capture(&self.vm)?;
        }
        stopped?;
        self.pause_devices()
    }

    /// Stops the guest whose RAM is about to be replaced, or that is about to end: nobody waits for
    /// memory that cannot be read.
    pub fn pause_for_good(&mut self) -> Result<(), Error> {
        if let Some(missing) = &self.missing {
            missing.ram.forfeit();
        }
        match self.pause() {
            Err(Error::Lost(_)) => Ok(()),
            other => other,
        }
    }

    /// Tells the vCPUs to stop, without waiting: one of them may be held up by a page that cannot be
    /// read, and stops when it gets it. Devices go on with what they were told to do. From here,
    /// [`Machine::resume`] tries to read again, and [`Machine::pause`] stops the guest wholly.
    pub fn halt(&mut self) -> Result<(), Error> {
        for vcpu in &self.vcpus {
            drop(vcpu.pause()?);
        }
        self.clock = ClockState::capture(&self.vm)?;
        self.halted = true;
        Ok(())
    }

    /// Whether the guest is halted.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    /// Whether a page that somebody waits for cannot be read.
    fn check_missing(&self) -> Result<(), Error> {
        match self.missing.as_ref().and_then(|missing| missing.ram.failing()) {
            Some(reason) => Err(Error::Missing(reason)),
            None => Ok(()),
        }
    }

    /// Drains the devices. Their threads cannot be left waiting for a page that cannot be read, so
    /// it is given up, and a request with it.
    fn pause_devices(&self) -> Result<(), Error> {
        let Some(missing) = &self.missing else { return self.devices.pause() };
        missing.ram.forfeit();
        self.devices.pause()?;
        match missing.ram.lost() {
            Some(reason) => Err(Error::Lost(reason)),
            None => {
                missing.ram.restored();
                Ok(())
            }
        }
    }
}
