//! What the working job's thread asks the main thread to do, and tells it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use qmp::jobs::WorkReport;
use qmp::schema::RunState;
use snapshot::{Base, PageSet, Stamp};

use crate::control::Controller;
use crate::control::pauses::nanoseconds;
use crate::control::work::{Freeze, Frozen, Loaded, Tracked, WorkError, WorkMessage};
use crate::machine::missing::Missing;
use crate::machine::recorded;
use crate::machine::state::MachineState;
use crate::memory::dirty_log::Protect;

impl Controller {
    /// What the working job wants.
    pub(in crate::control) fn work_message(&mut self, message: WorkMessage) {
        // Whoever asked waits for the answer, so it is there to receive it.
        match message {
            WorkMessage::Freeze { purpose, disks, reply } => {
                let _ = reply.send(self.freeze(&purpose, &disks));
            }
            WorkMessage::Track { reply } => {
                let _ = reply.send(self.track());
            }
            WorkMessage::Collect { reply } => {
                let _ = reply.send(self.collect());
            }
            WorkMessage::Thaw { guarded } => {
                self.guarded = guarded;
                // Not where a reset was asked for in the pause, and must wait.
                self.release_guest(true, false);
            }
            WorkMessage::Unguarded => {
                self.guarded = false;
                // A reset may have waited for it.
                self.release_guest(true, false);
            }
            WorkMessage::Passed => self.transaction_passed(),
            WorkMessage::Saved { base, report, rewind } => {
                if self.machine.is_tracking() {
                    self.machine.tracker().saved(base);
                    self.rewind = rewind;
                }
                self.job_report(|job| {
                    job.written = i64::try_from(report.bytes_written).ok();
                    job.incremental = Some(report.incremental);
                });
            }
            WorkMessage::Restore { loaded, reply } => {
                let Loaded { rewind, missing, clock } = *loaded;
                self.inbox.guest_replaced();
                let restored = self.restore(rewind.state(), rewind.base().clone(), missing);
                if restored.is_ok() {
                    self.machine.set_clock(clock, &Stamp::of(&rewind.base().snapshot));
                }
                self.rewind = restored.is_ok().then(|| Box::new(rewind));
                let _ = reply.send(restored);
            }
            WorkMessage::Run => self.release_guest(true, true),
            WorkMessage::Migration(step) => self.migration_step(step),
            WorkMessage::Doing { reply } => {
                let _ = reply.send(Ok(self.doing()));
            }
            WorkMessage::LetGo { reply } => {
                // RAM is whole: what a load had left in its image has been read.
                self.rewind = None;
                self.machine.forget_missing();
                let _ = reply.send(Ok(()));
            }
            WorkMessage::Final { reply } => {
                let _ = reply.send(self.migration_leaves());
            }
            WorkMessage::Arrived { arrived, reply } => {
                let _ = reply.send(self.arrived(&arrived));
            }
            WorkMessage::Done(outcome) => self.job_done(outcome),
        }
    }

    fn restore(
        &mut self,
        state: &MachineState,
        base: Base,
        missing: Option<Arc<Missing>>,
    ) -> Result<(), WorkError> {
        self.machine.restore(state, Some(base))?;
        match missing {
            Some(missing) => self.machine.set_missing(missing)?,
            None => self.machine.forget_missing(),
        }
        Ok(())
    }

    fn freeze(&mut self, purpose: &Freeze, disks: &[String]) -> Result<Frozen, WorkError> {
        if self.ending {
            return Err(WorkError::Cancelled);
        }
        self.check_disks(disks)?;
        let frozen = match purpose {
            Freeze::Save => self.freeze_to_save(RunState::SaveVm),
            Freeze::Migrate => {
                self.migration_stops();
                self.freeze_to_save(RunState::FinishMigrate)
            }
            Freeze::Load(state) => self.freeze_to_load(state),
        }?;
        // Once more: from here on the guest writes to none of them, whatever takes whose place.
        self.check_disks(disks)?;
        Ok(frozen)
    }

    /// A mirror's target, a commit's base or an overlay may have taken a disk's place since the job began:
    /// what the job knows as the disk is not what the guest has written since.
    fn check_disks(&self, known: &[String]) -> Result<(), WorkError> {
        let now = recorded::disks(&self.machine);
        if now == known {
            return Ok(());
        }
        let (known, now) = (known.join("', '"), now.join("', '"));
        Err(WorkError::Failed(format!(
            "The machine's disks were '{known}' when the job began and are '{now}' now: try again"
        )))
    }

    /// A save begins.
    fn track(&mut self) -> Result<Tracked, WorkError> {
        self.check_savable()?;
        self.machine.start_tracking()?;
        Ok(Tracked {
            base: self.machine.tracker().base().cloned(),
            logged: self.machine.is_tracking(),
            state_bytes: self.machine.most_state_bytes()?,
        })
    }

    /// A round of a save begins.
    fn collect(&mut self) -> Result<PageSet, WorkError> {
        self.check_savable()?;
        // A reset since the last round has turned it off.
        self.machine.start_tracking()?;
        self.machine.note_written(Protect::Again)?;
        Ok(self.machine.tracker().take())
    }

    fn check_savable(&self) -> Result<(), WorkError> {
        if self.ending {
            return Err(WorkError::Cancelled);
        }
        if self.state == RunState::RestoreVm {
            let text = "There is nothing to save: the guest's memory was lost in a failed load";
            return Err(WorkError::Failed(text.to_owned()));
        }
        Ok(())
    }

    fn freeze_to_save(&mut self, state: RunState) -> Result<Frozen, WorkError> {
        self.check_savable()?;
        self.hold_guest(state)?;
        let date = SystemTime::now();
        let state = self.machine.capture()?;
        self.machine.note_written(Protect::Again)?;
        Ok(Frozen { state, pages: self.machine.tracker().take(), date })
    }

    /// A save kept the guest standing for so long.
    pub(in crate::control) fn guest_was_held(&mut self, pause: Duration) {
        self.pauses.record(pause);
        self.job_report(|job| {
            // A save may try more than once.
            let before = job.longest_pause.unwrap_or(0);
            job.longest_pause = Some(before.max(nanoseconds(pause)));
        });
    }

    fn job_report(&self, change: impl FnOnce(&mut WorkReport)) {
        if let Some(current) = &self.jobs.current {
            change(&mut current.handle.report.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn freeze_to_load(&mut self, state: &MachineState) -> Result<Frozen, WorkError> {
        self.machine.check_fits(state)?;
        if self.machine.is_halted() {
            // It waits for memory that cannot be read, and will not get it any more.
            if let Some(current) = &self.jobs.current {
                current.handle.memory_lost.store(true, Ordering::Release);
            }
            self.machine.pause_for_good()?;
        }
        self.hold_guest(RunState::RestoreVm)?;
        let pages = self.machine.tracker().dirty().empty_like();
        let frozen = Frozen { state: self.machine.capture()?, pages, date: SystemTime::now() };
        if let Some(current) = &self.jobs.current {
            // A cancel that came before this has been heard; the job looks once more.
            current.handle.committed.store(true, Ordering::Release);
        }
        Ok(frozen)
    }
}
