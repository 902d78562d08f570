//! Beginning and cancelling a migration: commands, and `--incoming`.

use qmp::schema::{
    MigrateArguments, MigrateIncomingArguments, MigrationCapability, MigrationStatus, RunState,
};

use super::{IN_PROGRESS, Incoming, MIGRATION, generic};
use crate::control::snapshot_jobs::{Current, Handle};
use crate::control::work::incoming::{self, Wanted};
use crate::control::work::migrate;
use crate::control::work::{self, Outcome, WorkError};
use crate::control::{Controller, Error};
use crate::migration::address::Address;
use crate::migration::{input, output};

impl Controller {
    /// `migrate`
    pub(in crate::control) fn migrate(
        &mut self,
        arguments: &MigrateArguments,
    ) -> Result<(), qmp::Error> {
        let address = Address::of_command(arguments.uri.as_deref(), arguments.channels.as_deref());
        let address = address.map_err(generic)?;
        if arguments.resume == Some(true) {
            return Err(generic("Cannot resume if there is no paused migration"));
        }
        if self.migration.is_active() && self.state != RunState::InMigrate {
            return Err(generic(IN_PROGRESS));
        }
        match self.state {
            RunState::InMigrate => {
                return Err(generic("Guest is waiting for an incoming migration"));
            }
            RunState::PostMigrate => {
                let text = "Can't migrate the vm that was paused due to previous migration";
                return Err(generic(text));
            }
            _ => self.check_no_snapshot_job()?,
        }
        let shared = self.migration.begin(true, None).map_err(|e| generic(e.to_string()))?;
        self.migration_is(MigrationStatus::Setup);
        let to = output::prepare(&address).map_err(|text| self.refuse_migration(text))?;
        self.start_migration(move |context| migrate::migrate(to, &shared, context));
        Ok(())
    }

    /// `migrate-incoming`
    pub(in crate::control) fn migrate_incoming(
        &mut self,
        arguments: &MigrateIncomingArguments,
    ) -> Result<(), qmp::Error> {
        let Some(awaits) = &self.migration.awaits else {
            return Err(generic("'-incoming' was not specified on the command line"));
        };
        if awaits.from.is_none() {
            return Err(generic("The incoming migration has already been started"));
        }
        let address = Address::of_command(arguments.uri.as_deref(), arguments.channels.as_deref());
        let exits = arguments.exit_on_error.unwrap_or(true);
        self.receive(&address.map_err(generic)?, exits)
    }

    /// Begins with what the command line asks for.
    pub(in crate::control) fn begin_incoming(&mut self) -> Result<(), Error> {
        let Some(awaits) = &self.migration.awaits else { return Ok(()) };
        self.state = RunState::InMigrate;
        let Some(Incoming::From(address)) = awaits.from.clone() else { return Ok(()) };
        self.receive(&address, true).map_err(|error| Error::Incoming(error.desc))
    }

    fn receive(&mut self, address: &Address, exit_on_error: bool) -> Result<(), qmp::Error> {
        let from = input::prepare(address).map_err(generic)?;
        let socket = match address {
            Address::Unix(path) => Some(path.clone()),
            _ => None,
        };
        let same_uuid = self.migration.is_wanted(MigrationCapability::ValidateUuid);
        let shared = self.migration.begin(false, socket).map_err(|e| generic(e.to_string()))?;
        if let Some(awaits) = &mut self.migration.awaits {
            awaits.from = None;
            awaits.exit_on_error = exit_on_error;
        }
        self.migration_is(MigrationStatus::Setup);
        let wanted = Wanted { stopper: shared.stopper, same_uuid };
        self.start_migration(move |context| incoming::receive(from, &wanted, context));
        Ok(())
    }

    fn refuse_migration(&mut self, text: String) -> qmp::Error {
        self.migration_ended(MigrationStatus::Failed, Some(text.clone()));
        generic(text)
    }

    fn start_migration(
        &mut self,
        work: impl FnOnce(&work::WorkContext) -> Outcome + Send + 'static,
    ) {
        let handle = Handle::unlisted(self.blocks.jobs().clone());
        let context = self.work_context(&handle);
        match work::start_with("migration", context, work) {
            Ok(thread) => {
                let id = MIGRATION.to_owned();
                self.jobs.current = Some(Current { id, handle, thread: Some(thread) });
            }
            Err(error) => {
                let text = format!("Cannot start the migration's thread: {error}");
                self.migration_done(Err(WorkError::Failed(text)));
            }
        }
    }

    /// `migrate_cancel`
    pub(in crate::control) fn migrate_cancel(&mut self) {
        let Some(last) = &self.migration.last else { return };
        // An incoming migration cannot be taken back; `quit` ends it.
        if last.outgoing && self.migrates() && !last.is_final {
            self.end_migration();
            self.migration_is(MigrationStatus::Cancelling);
        }
    }

    /// `stop` and `cont` of a machine that waits for another.
    pub(in crate::control) fn start_when_arrived(&mut self, start: bool) {
        if let Some(awaits) = &mut self.migration.awaits {
            awaits.start = start;
        }
    }
}
