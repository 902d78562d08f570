//! Migrations: `docs/migration.md`. The work is done by a thread ([`super::work`]); here is what clients
//! say and hear of it.
//!
//! ```text
//!   none ──> setup ──> active ──> device ──> completed
//!              │          │          │
//!              └──────────┴──────────┴─────> failed, or cancelling ──> cancelled
//! ```

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use qmp::schema::{
    Event, MigrateArguments, MigrateIncomingArguments, MigrationCapability,
    MigrationCapabilityStatus, MigrationInfo, MigrationParameters, MigrationSocket, MigrationStats,
    MigrationStatus, RunState, ShutdownCause,
};
use tracing::error;

use super::snapshot_jobs::{Current, Handle};
use super::work::incoming::{self, Arrived, Wanted};
use super::work::migrate::{self, Limits, Numbers, Shared, Step, lock, rate};
use super::work::{self, Outcome, WorkError};
use super::{Controller, Error};
use crate::migration::address::Address;
use crate::migration::wait::Stopper;
use crate::migration::{input, output};

/// The id of what is in no list of jobs.
const MIGRATION: &str = "#migration";
/// Longest `downtime-limit` in milliseconds, as in QEMU.
const MAX_DOWNTIME_MS: u64 = 2000 * 1000;
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

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

impl Controller {
    /// `migrate`
    pub(super) fn migrate(&mut self, arguments: &MigrateArguments) -> Result<(), qmp::Error> {
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
    pub(super) fn migrate_incoming(
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
    pub(super) fn begin_incoming(&mut self) -> Result<(), Error> {
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

    /// Whether what is under way is a migration.
    pub(super) fn migrates(&self) -> bool {
        self.jobs.current.as_ref().is_some_and(|current| current.id == MIGRATION)
    }

    /// For commands that cannot be done meanwhile.
    pub(super) fn check_no_migration(&self) -> Result<(), qmp::Error> {
        if self.migrates() { Err(generic(IN_PROGRESS)) } else { Ok(()) }
    }

    /// `migrate_cancel`
    pub(super) fn migrate_cancel(&mut self) {
        let Some(last) = &self.migration.last else { return };
        // What comes in cannot be told to go back; the process can end.
        if last.outgoing && self.migrates() && !last.is_final {
            self.end_migration();
            self.migration_is(MigrationStatus::Cancelling);
        }
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

    /// The thread has ended.
    pub(super) fn migration_done(&mut self, outcome: Outcome) {
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
        if let Some(text) = &text {
            error!("migration failed: {text}");
        }
        match outgoing {
            true => self.sent(status, text),
            false => self.received(status, text),
        }
        self.start_next_job();
    }

    fn sent(&mut self, status: MigrationStatus, text: Option<String>) {
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
            self.migration_ended(status, Some(format!("load of migration failed: {text}")));
            if exits {
                self.failure = Some(Error::Incoming(text));
                self.ending = true;
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
    pub(super) fn arrived(&mut self, arrived: &Arrived) -> Outcome {
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

    /// `stop` and `cont` of a machine that waits for another.
    pub(super) fn start_when_arrived(&mut self, start: bool) {
        if let Some(awaits) = &mut self.migration.awaits {
            awaits.start = start;
        }
    }

    /// `migrate-set-capabilities`
    pub(super) fn set_capabilities(
        &mut self,
        given: &[MigrationCapabilityStatus],
    ) -> Result<(), qmp::Error> {
        // What waits for another machine may be told late, as in QEMU.
        if self.migration.is_active() && self.state != RunState::InMigrate {
            return Err(generic(IN_PROGRESS));
        }
        for MigrationCapabilityStatus { capability, state } in given {
            self.migration.capabilities.retain(|other| other != capability);
            if *state {
                self.migration.capabilities.push(*capability);
            }
        }
        Ok(())
    }

    /// `query-migrate-capabilities`
    pub(super) fn capabilities(&self) -> Vec<MigrationCapabilityStatus> {
        let of = |&capability: &MigrationCapability| MigrationCapabilityStatus {
            capability,
            state: self.migration.is_wanted(capability),
        };
        MigrationCapability::ALL.iter().map(of).collect()
    }

    /// `migrate-set-parameters`
    pub(super) fn set_parameters(&mut self, given: &MigrationParameters) -> Result<(), qmp::Error> {
        if given.downtime_limit.is_some_and(|limit| limit > MAX_DOWNTIME_MS) {
            let text = "Parameter 'downtime_limit' expects an integer in the range of 0 to \
                        (2000 * 1000) ms";
            return Err(generic(text));
        }
        let mut limits = lock(&self.migration.limits);
        limits.bandwidth = given.max_bandwidth.unwrap_or(limits.bandwidth);
        limits.switchover = given.avail_switchover_bandwidth.unwrap_or(limits.switchover);
        limits.downtime = given.downtime_limit.map_or(limits.downtime, Duration::from_millis);
        Ok(())
    }

    /// `query-migrate-parameters`
    pub(super) fn parameters(&self) -> MigrationParameters {
        let limits = *lock(&self.migration.limits);
        MigrationParameters {
            max_bandwidth: Some(limits.bandwidth),
            avail_switchover_bandwidth: Some(limits.switchover),
            downtime_limit: u64::try_from(limits.downtime.as_millis()).ok(),
        }
    }

    /// `query-migrate`
    pub(super) fn migration_info(&self) -> MigrationInfo {
        let mut info = MigrationInfo {
            status: None,
            ram: None,
            total_time: None,
            expected_downtime: None,
            downtime: None,
            setup_time: None,
            error_desc: None,
            socket_address: None,
        };
        let Some(last) = &self.migration.last else { return info };
        info.status = Some(last.status);
        info.error_desc.clone_from(&last.error);
        if !last.outgoing {
            let waits = last.status == MigrationStatus::Setup;
            info.socket_address = last
                .socket
                .as_ref()
                .filter(|_| waits)
                .map(|path| vec![MigrationSocket::Unix { path: path.display().to_string() }]);
            return info;
        }
        let told = matches!(
            last.status,
            MigrationStatus::Active
                | MigrationStatus::Device
                | MigrationStatus::Cancelling
                | MigrationStatus::Completed
        );
        if !told {
            return info;
        }
        let numbers = last.shared.numbers();
        info.total_time = Some(milliseconds(last.total.unwrap_or(last.began.elapsed())));
        info.setup_time = last.setup.map(milliseconds);
        if last.status == MigrationStatus::Completed {
            info.downtime = last.downtime.map(milliseconds);
        } else {
            let expected = numbers.expected_pause.unwrap_or(last.shared.limits().downtime);
            info.expected_downtime = Some(milliseconds(expected));
        }
        info.ram = Some(self.statistics(last, numbers));
        info
    }

    fn statistics(&self, last: &Last, numbers: Numbers) -> MigrationStats {
        let sent = numbers.sent;
        let time = last.total.unwrap_or(last.began.elapsed());
        let time = time.saturating_sub(last.setup.unwrap_or_default());
        MigrationStats {
            transferred: sent.bytes,
            remaining: numbers.remaining,
            total: self.machine.spec().ram_bytes,
            duplicate: sent.zero,
            normal: sent.pages,
            normal_bytes: sent.pages * snapshot::PAGE_SIZE,
            dirty_pages_rate: numbers.dirty_rate,
            mbps: rate(sent.bytes * 8, time) as f64 / 1e6,
            dirty_sync_count: numbers.rounds,
            postcopy_requests: 0,
            page_size: snapshot::PAGE_SIZE,
            multifd_bytes: 0,
            pages_per_second: rate(sent.pages + sent.zero, time),
            precopy_bytes: sent.bytes.saturating_sub(numbers.in_pause),
            downtime_bytes: numbers.in_pause,
            postcopy_bytes: 0,
            dirty_sync_missed_zero_copy: 0,
        }
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
