//! The end of a migration, here and there: what becomes of the guest.

use qmp::schema::{MigrationStatus, RunState, ShutdownCause};
use tracing::error;

use crate::control::snapshot_jobs::Current;
use crate::control::work::incoming::Arrived;
use crate::control::work::{Outcome, WorkError};
use crate::control::{Controller, Error};

impl Controller {
    /// The thread has ended.
    pub(in crate::control) fn migration_done(&mut self, outcome: Outcome) {
        if let Some(Current { thread: Some(thread), .. }) = self.jobs.current.take()
            && thread.join().is_err()
        {
            error!("the migration's thread has panicked");
        }
        // RAM is as it was to a checkpoint that comes.
        self.machine.tracker().failed();
        let outgoing = self.migration.last.as_ref().is_some_and(|last| last.outgoing);
        let (status, text) = match outcome {
            Ok(()) => (MigrationStatus::Completed, None),
            Err(WorkError::Cancelled) => (MigrationStatus::Cancelled, None),
            Err(WorkError::Failed(text)) => (MigrationStatus::Failed, Some(text)),
        };
        match outgoing {
            true => self.sent(status, text),
            false => self.received(status, text),
        }
        self.start_next_job();
    }

    fn sent(&mut self, status: MigrationStatus, text: Option<String>) {
        if let Some(text) = &text {
            error!("migration failed: {text}");
        }
        let gone = self.migration.last.as_ref().is_some_and(|last| last.disks_are_gone);
        if status == MigrationStatus::Completed || gone {
            self.leave_guest();
            return self.migration_ended(status, text);
        }
        self.migration_ended(status, text);
        self.release_guest(false, false);
    }

    fn received(&mut self, status: MigrationStatus, text: Option<String>) {
        if self.ending {
            // What does not come any more is no failure.
            return self.with_last(|last| last.total = Some(last.began.elapsed()));
        }
        if let Some(text) = text {
            let exits = self.migration.awaits.as_ref().is_some_and(|awaits| awaits.exit_on_error);
            let told = format!("load of migration failed: {text}");
            self.migration_ended(status, Some(told.clone()));
            if exits {
                // The process's last word.
                self.failure = Some(Error::Incoming(text));
                self.ending = true;
            } else {
                error!("{told}");
            }
            return;
        }
        let awaits = self.migration.awaits.as_ref();
        let doing = awaits.and_then(|awaits| Some((awaits.doing.as_deref()?, awaits.start)));
        if let Some((doing, start)) = doing {
            let told = RunState::ALL.iter().copied().find(|state| state.as_str() == doing);
            self.state = match told {
                Some(state @ (RunState::PreLaunch | RunState::IoError)) => state,
                _ => RunState::Paused,
            };
            if told == Some(RunState::Running) && start {
                // The state tells of a failure.
                let _ = self.resume_guest();
            }
        }
        self.migration_ended(status, None);
    }

    /// The machine that was sent is here: it takes its state.
    pub(in crate::control) fn arrived(&mut self, arrived: &Arrived) -> Outcome {
        if self.ending {
            return Err(WorkError::Cancelled);
        }
        self.machine.check_fits(&arrived.state)?;
        self.inbox.guest_replaced();
        self.machine.restore(&arrived.state, None)?;
        if let Some(awaits) = &mut self.migration.awaits {
            awaits.doing = Some(arrived.doing.clone());
        }
        Ok(())
    }

    /// After a migration: the guest is elsewhere, or may be.
    fn leave_guest(&mut self) {
        let reset = self.hold.take().and_then(|hold| hold.reset);
        self.state = RunState::PostMigrate;
        if let Some(cause) = reset.filter(|_| !self.ending) {
            self.reset_paused(cause == ShutdownCause::GuestReset, cause, false);
        }
    }
}
