//! Migrations: `docs/migration.md`. The work is done by a thread ([`super::work`]); here is what clients
//! say and hear of it.
//!
//! ```text
//!   none ──> setup ──> active ──> device ──> completed
//!              │          │          │
//!              └──────────┴──────────┴─────> failed, or cancelling ──> cancelled
//! ```

mod commands;
mod end;
mod info;
mod settings;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use qmp::schema::{Event, MigrationCapability, MigrationStatus};

use super::Controller;
use super::work::migrate::{Limits, Shared, Step};
use super::work::{Outcome, WorkError};
use crate::migration::address::Address;
use crate::migration::wait::Stopper;

/// The id of what is in no list of jobs.
const MIGRATION: &str = "#migration";
const IN_PROGRESS: &str = "There's a migration process in progress";

/// What `--incoming` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// `migrate-incoming` will tell where the machine comes from.
    Defer,
    /// It comes from there.
    From(Address),
}

/// What is known of migrations.
pub(super) struct Migration {
    capabilities: Vec<MigrationCapability>,
    limits: Arc<Mutex<Limits>>,
    last: Option<Last>,
    /// The machine was started to be what comes.
    awaits: Option<Awaits>,
}

/// A machine that waits for another.
struct Awaits {
    /// What was asked for, until it is begun with.
    from: Option<Incoming>,
    /// The guest may run when it is there.
    start: bool,
    exit_on_error: bool,
    /// It is here, and does that once its thread has ended.
    doing: Option<String>,
}

/// The last migration.
struct Last {
    outgoing: bool,
    status: MigrationStatus,
    shared: Shared,
    error: Option<String>,
    began: Instant,
    setup: Option<Duration>,
    total: Option<Duration>,
    /// Since when the guest stands still.
    stopped: Option<Instant>,
    downtime: Option<Duration>,
    socket: Option<PathBuf>,
    /// The other end may have all of it.
    is_final: bool,
    disks_are_gone: bool,
}

impl Migration {
    pub(super) fn new(incoming: Option<Incoming>, start: bool) -> Self {
        let awaits = |from| Awaits { from: Some(from), start, exit_on_error: true, doing: None };
        Self {
            capabilities: Vec::new(),
            limits: Arc::default(),
            last: None,
            awaits: incoming.map(awaits),
        }
    }

    fn is_wanted(&self, capability: MigrationCapability) -> bool {
        self.capabilities.contains(&capability)
    }

    /// One is under way.
    pub(super) fn is_active(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.total.is_none())
    }

    fn begin(&mut self, outgoing: bool, socket: Option<PathBuf>) -> std::io::Result<Shared> {
        let limits = Arc::clone(&self.limits);
        let shared = Shared { limits, numbers: Arc::default(), stopper: Stopper::new()? };
        self.last = Some(Last {
            outgoing,
            status: MigrationStatus::None,
            shared: shared.clone(),
            error: None,
            began: Instant::now(),
            setup: None,
            total: None,
            stopped: None,
            downtime: None,
            socket,
            is_final: false,
            disks_are_gone: false,
        });
        Ok(shared)
    }
}

fn generic(text: impl Into<String>) -> qmp::Error {
    qmp::Error::generic(text)
}

impl Controller {
    /// Whether what is under way is a migration.
    pub(super) fn migrates(&self) -> bool {
        self.jobs.current.as_ref().is_some_and(|current| current.id == MIGRATION)
    }

    /// For commands that cannot be done meanwhile.
    pub(super) fn check_no_migration(&self) -> Result<(), qmp::Error> {
        if self.migrates() { Err(generic(IN_PROGRESS)) } else { Ok(()) }
    }

    /// Has the thread of a migration end soon.
    pub(super) fn end_migration(&self) {
        let current = self.jobs.current.as_ref().filter(|current| current.id == MIGRATION);
        if let (Some(current), Some(last)) = (current, &self.migration.last) {
            current.handle.progress.cancel();
            last.shared.stopper.stop();
        }
    }

    /// What the thread has to tell.
    pub(super) fn migration_step(&mut self, step: Step) {
        match step {
            Step::Status(status) => {
                let cancelling = |last: &Last| last.status == MigrationStatus::Cancelling;
                if let Some(last) = &mut self.migration.last {
                    if status == MigrationStatus::Active {
                        last.setup = Some(last.began.elapsed());
                    }
                    if !cancelling(last) {
                        self.migration_is(status);
                    }
                }
            }
            Step::Pass(pass) => {
                if self.migration.is_wanted(MigrationCapability::Events) {
                    self.emit(&Event::MigrationPass { pass: i64::try_from(pass).unwrap_or(0) });
                }
            }
            Step::DisksAreGone => self.with_last(|last| last.disks_are_gone = true),
        }
    }

    /// The other end is about to have all of it: it cannot be cancelled any more.
    pub(super) fn migration_leaves(&mut self) -> Outcome {
        let cancelling = |last: &Last| last.status == MigrationStatus::Cancelling;
        if self.ending || self.migration.last.as_ref().is_some_and(cancelling) {
            return Err(WorkError::Cancelled);
        }
        self.with_last(|last| last.is_final = true);
        Ok(())
    }

    /// The guest stands still for the last of it.
    pub(super) fn migration_stops(&mut self) {
        self.with_last(|last| last.stopped = Some(Instant::now()));
    }

    fn with_last(&mut self, change: impl FnOnce(&mut Last)) {
        if let Some(last) = &mut self.migration.last {
            change(last);
        }
    }

    fn migration_is(&mut self, status: MigrationStatus) {
        self.with_last(|last| last.status = status);
        if self.migration.is_wanted(MigrationCapability::Events) {
            self.emit(&Event::Migration { status });
        }
    }

    fn migration_ended(&mut self, status: MigrationStatus, error: Option<String>) {
        self.with_last(|last| {
            last.total = Some(last.began.elapsed());
            last.downtime = last.stopped.map(|since| since.elapsed());
            last.error = error;
        });
        self.migration_is(status);
    }
}
