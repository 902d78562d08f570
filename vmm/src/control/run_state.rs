//! What the machine is doing, and the ways from one state to another.
//!
//! ```text
//!                      cont                 Freeze
//!   prelaunch ───────────────> running ───────────────> save-vm, restore-vm
//!       ^                       │  ^                        │
//!       │ system_reset     stop │  │ cont              Done │ success, or a failure that left
//!       │                       v  │                        v the guest as it was
//!       └──────────────────── paused                running, or what it was before
//!                                                           │ failure with memory lost
//!                                                           v
//!                                                   restore-vm, until a load or a reset
//! ```
//!
//! A request that fails on the host stops the guest in io-error where the user wants that, and a
//! guest that needs RAM which a lazy load cannot read goes there, too; `cont` tries again. A live save lets the guest go on before its job is done.
//!
//! While a job holds the guest, `stop`, `cont` and `system_reset` are remembered and take effect
//! when the job lets go. A vCPU that cannot go on leads to internal-error.
//!
//! A migration stops the guest in finish-migrate; when it is completed the state is postmigrate, from which
//! `cont` leads back if the disks can be had. A machine that waits for one is in inmigrate, and goes on
//! as the one that came.
//!
//! A reset replaces RAM, which a guarded save reads after it has let the guest go: whether the reset comes
//! before that or after, the guest stands still until the save has read all, and is reset then.

use std::time::Instant;

use qmp::schema::{BlockErrorAction, Event, IoOperationType, RunState, ShutdownCause};
use snapshot::Notice;
use tracing::error;

use super::Controller;
use super::work::WorkError;
use crate::machine::{self};

/// A job that keeps the guest stopped.
#[derive(Debug)]
pub(super) struct Hold {
    /// What the machine was doing.
    before: RunState,
    /// Whether the guest runs on afterwards.
    resume: bool,
    /// A reset was asked for meanwhile.
    pub(super) reset: Option<ShutdownCause>,
    /// Since when it stands still, if it was saved while it ran.
    saved: Option<Instant>,
}

impl Hold {
    /// The guest is not to run on: a disk's request waits.
    pub(super) fn fail(&mut self) {
        self.resume = false;
        if self.before == RunState::Running {
            self.before = RunState::IoError;
        }
    }
}

impl Controller {
    /// `cont`
    pub(super) fn cont(&mut self) -> Result<(), qmp::Error> {
        if let Some(hold) = &mut self.hold {
            hold.resume = true;
            return Ok(());
        }
        match self.state {
            RunState::Running => Ok(()),
            RunState::InMigrate => {
                self.start_when_arrived(true);
                Ok(())
            }
            RunState::PreLaunch | RunState::Paused | RunState::IoError | RunState::PostMigrate => {
                // After a migration they may be another process's.
                let taken = self.blocks.graph().activate();
                taken.map_err(|error| qmp::Error::generic(error.to_string()))?;
                self.resume_guest()
            }
            RunState::RestoreVm => Err(qmp::Error::generic(
                "The guest's memory was lost in a failed load: load a checkpoint or reset the \
                 machine first",
            )),
            state => Err(qmp::Error::generic(format!(
                "The guest cannot go on from state '{state}': reset the machine first"
            ))),
        }
    }

    /// `stop`
    pub(super) fn stop(&mut self) {
        match &mut self.hold {
            Some(hold) => {
                hold.resume = false;
                if hold.before == RunState::Running {
                    hold.before = RunState::Paused;
                }
            }
            None if self.state == RunState::InMigrate => self.start_when_arrived(false),
            None => self.stop_in(RunState::Paused),
        }
    }

    /// What the guest does, or is going to do when nobody holds it any more.
    pub(super) fn doing(&self) -> RunState {
        match &self.hold {
            Some(hold) if hold.resume => RunState::Running,
            Some(hold) if hold.before == RunState::Running => RunState::Paused,
            Some(hold) => hold.before,
            None => self.state,
        }
    }

    /// Stops a running guest; one that does not run stays as it is.
    pub(super) fn stop_in(&mut self, state: RunState) {
        if self.state != RunState::Running {
            return;
        }
        self.state = match self.machine.pause() {
            Ok(()) => state,
            Err(machine::Error::Missing(reason)) => {
                error!("the guest is stopped: {reason}");
                RunState::IoError
            }
            Err(error) => {
                error!("cannot pause the guest: {error}");
                RunState::InternalError
            }
        };
        self.emit(&Event::Stop);
    }

    pub(super) fn resume_guest(&mut self) -> Result<(), qmp::Error> {
        if let Err(error) = self.machine.resume() {
            error!("cannot resume the guest: {error}");
            self.state = RunState::InternalError;
            return Err(qmp::Error::generic(format!("Cannot resume the guest: {error}")));
        }
        self.state = RunState::Running;
        self.emit(&Event::Resume);
        Ok(())
    }

    /// Stops the guest for a job. The state stays as it is where the guest did not run.
    ///
    /// # Errors
    /// The guest cannot be stopped; the machine is in state internal-error then.
    pub(super) fn hold_guest(&mut self, state: RunState) -> Result<(), WorkError> {
        if self.hold.is_some() {
            return Ok(());
        }
        let (before, since) = (self.state, Instant::now());
        self.stop_in(state);
        // What it waited for has come, or it would not be asked.
        if before == RunState::IoError && self.machine.is_halted() {
            self.machine.pause()?;
        }
        if before == RunState::Running && self.state != state {
            return Err(WorkError::Failed("The guest cannot be stopped".to_owned()));
        }
        let resume = before == RunState::Running;
        let saved = (resume && state == RunState::SaveVm).then_some(since);
        self.hold = Some(Hold { before, resume, reset: None, saved });
        Ok(())
    }

    /// The job is over: the guest goes on as before, if there is one left. `overwritten` tells that
    /// the job has replaced the guest's memory, or begun to. While a save still reads RAM, a guest that
    /// is to be reset is not let go.
    pub(super) fn release_guest(&mut self, success: bool, overwritten: bool) {
        let guarded = self.guarded;
        let Some(hold) = self.hold.take_if(|hold| !(guarded && hold.reset.is_some())) else {
            return;
        };
        // A machine that ends does not run again: what it would do then is in no checkpoint.
        if self.ending {
            return;
        }
        let lost = overwritten && !success;
        self.state = match hold.before {
            _ if lost => RunState::RestoreVm,
            // A load makes a machine that could not go on whole again.
            RunState::RestoreVm | RunState::InternalError | RunState::IoError
                if success && overwritten =>
            {
                RunState::Paused
            }
            RunState::Running => RunState::Paused,
            before => before,
        };
        // What the guest wanted before a load has gone with that guest.
        let replaced = overwritten && success;
        let reset = hold.reset.filter(|&cause| !(replaced && cause == ShutdownCause::GuestReset));
        if self.ending {
            return;
        }
        if let Some(cause) = reset {
            if cause == ShutdownCause::GuestReset && self.ends_at_reset() {
                return self.shutdown(true, cause);
            }
            self.state = if hold.resume { RunState::Running } else { RunState::PreLaunch };
            let guest = cause == ShutdownCause::GuestReset;
            self.reset_paused(guest, cause, hold.resume);
        } else if hold.resume && matches!(self.state, RunState::Paused | RunState::PreLaunch) {
            // The state tells of a failure.
            let _ = self.resume_guest();
            if let Some(since) = hold.saved {
                self.guest_was_held(since.elapsed());
            }
        }
    }

    /// `system_reset`
    pub(super) fn system_reset(&mut self) -> Result<(), qmp::Error> {
        if self.state == RunState::InMigrate {
            // There is no guest yet; the one that comes is not reset by it.
            let reason = ShutdownCause::HostQmpSystemReset;
            self.emit(&Event::Reset { guest: false, reason });
            return Ok(());
        }
        if self.machine.spec().kernel.is_none() {
            return Err(qmp::Error::generic(machine::Error::NoKernel.to_string()));
        }
        let cause = ShutdownCause::HostQmpSystemReset;
        self.hold_while_guarded();
        if let Some(hold) = &mut self.hold {
            hold.reset = Some(cause);
        } else {
            self.reset(false, cause);
        }
        Ok(())
    }

    /// `system_powerdown`
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub(super) fn system_powerdown(&mut self) -> Result<(), qmp::Error> {
        self.emit(&Event::Powerdown);
        match self.machine.devices().events() {
            Some(events) => events
                .raise(devices::acpi::Event::PowerButton)
                .map_err(|error| qmp::Error::generic(error.to_string())),
            None => Ok(()),
        }
    }

    /// What the service of a lazy load has to tell.
    pub(super) fn missing_notice(&mut self, id: u64, notice: Notice) {
        let Some(missing) = self.machine.missing().filter(|missing| missing.id() == id) else {
            return;
        };
        match notice {
            Notice::Complete => self.machine.forget_missing(),
            // Whoever brought it about finds it out.
            Notice::Lost => {}
            Notice::Failing(reason) => {
                error!("RAM of '{}' cannot be read from '{}': {reason}", missing.tag, missing.node);
                let event = Event::BlockIoError {
                    qom_path: String::new(),
                    device: String::new(),
                    node_name: Some(missing.node.clone()),
                    operation: IoOperationType::Read,
                    action: BlockErrorAction::Stop,
                    nospace: Some(false),
                    reason,
                };
                self.emit(&event);
                self.halt();
            }
        }
    }

    /// Stops a running guest that waits for memory.
    fn halt(&mut self) {
        if self.state != RunState::Running {
            return;
        }
        self.state = match self.machine.halt() {
            Ok(()) => RunState::IoError,
            Err(error) => {
                error!("cannot halt the guest: {error}");
                RunState::InternalError
            }
        };
        self.emit(&Event::Stop);
    }

    /// The guest asked for a reset, or crashed so that a real machine would reset.
    pub(super) fn guest_reset(&mut self) {
        // A vCPU can have asked just before it was stopped; then the reset waits.
        self.hold_while_guarded();
        if let Some(hold) = &mut self.hold {
            hold.reset = Some(ShutdownCause::GuestReset);
        } else if self.ends_at_reset() {
            self.shutdown(true, ShutdownCause::GuestReset);
        } else {
            self.reset(true, ShutdownCause::GuestReset);
        }
    }

    /// Before a reset: where a save still reads RAM, the guest stands still until it has, and is reset
    /// then.
    fn hold_while_guarded(&mut self) {
        if self.guarded
            && self.hold.is_none()
            && let Err(error) = self.hold_guest(RunState::SaveVm)
        {
            error!("the save comes to nothing, the guest cannot be stopped for it: {error:?}");
            self.jobs.give_up_current();
        }
    }

    /// Whether a reset by the guest ends the machine: it is to, or there is nothing to boot.
    fn ends_at_reset(&self) -> bool {
        self.no_reboot || self.machine.spec().kernel.is_none()
    }

    fn reset(&mut self, guest: bool, cause: ShutdownCause) {
        let running = self.state == RunState::Running;
        let stopped = if running || self.machine.is_halted() {
            self.machine.pause_for_good()
        } else {
            Ok(())
        };
        if let Err(error) = stopped {
            error!("cannot pause the guest for a reset: {error}");
            self.state = RunState::InternalError;
            self.emit(&Event::Stop);
            return;
        }
        self.reset_paused(guest, cause, running);
    }

    pub(super) fn reset_paused(&mut self, guest: bool, reason: ShutdownCause, run: bool) {
        let booted = machine::prepare_boot(self.machine.spec())
            .and_then(|prepared| self.machine.boot(prepared));
        self.inbox.guest_replaced();
        self.emit(&Event::Reset { guest, reason });
        self.state = RunState::PreLaunch;
        let resumed = booted.and_then(|()| if run { self.machine.resume() } else { Ok(()) });
        match resumed {
            Ok(()) if run => self.state = RunState::Running,
            Ok(()) => {}
            Err(error) => {
                error!("cannot reset the machine: {error}");
                self.state = RunState::InternalError;
                self.emit(&Event::Stop);
            }
        }
    }

    /// The machine ends. The first reason counts.
    pub(super) fn shutdown(&mut self, guest: bool, reason: ShutdownCause) {
        if !self.ending {
            self.ending = true;
            self.emit(&Event::Shutdown { guest, reason });
        }
    }
}
