//! An outgoing migration: `docs/migration.md` has the order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::throttle::{Bucket, Rate};
use qmp::schema::MigrationStatus;
use snapshot::stream::{Sent, StreamError, StreamWriter};
use snapshot::{About, PageSet};
use tracing::{error, info};

use super::{Freeze, Frozen, Outcome, WorkContext, WorkError, WorkMessage};
use crate::migration::output::{Output, Prepared};
use crate::migration::wait::Stopper;

/// How long a limit that was changed may go unnoticed.
const LOOK: Duration = Duration::from_millis(50);

/// What migrations may use; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a second while the guest runs.
    pub bandwidth: u64,
    /// Bytes a second that are counted on in the pause; 0: as measured.
    pub switchover: u64,
    /// How long the last of RAM may take.
    pub downtime: Duration,
}

impl Default for Limits {
    /// QEMU's.
    fn default() -> Self {
        Self { bandwidth: 128 << 20, switchover: 0, downtime: Duration::from_millis(300) }
    }
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Numbers {
    /// What was sent.
    pub sent: Sent,
    /// Bytes of it in the pause.
    pub in_pause: u64,
    /// Bytes of RAM that this round has still to send.
    pub remaining: u64,
    /// How often what was written was asked for.
    pub rounds: u64,
    /// Pages a second that the guest has written lately.
    pub dirty_rate: u64,
    /// How long the last of RAM would take now.
    pub expected_pause: Option<Duration>,
}

/// What the main thread and the migration's share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// May change at any time.
    pub limits: Arc<Mutex<Limits>>,
    /// As of the last piece.
    pub numbers: Arc<Mutex<Numbers>>,
    /// Ends it.
    pub stopper: Stopper,
}

impl Shared {
    /// The limits now.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// The numbers now.
    pub fn numbers(&self) -> Numbers {
        *lock(&self.numbers)
    }
}

/// A lock whose holder never panics.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that clients hear of.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// It is further.
    Status(MigrationStatus),
    /// What was written was asked for.
    Pass(u64),
    /// The disks are another process's, and cannot be had back.
    DisksAreGone,
}

pub(in crate::control) fn migrate(to: Prepared, shared: &Shared, context: &WorkContext) -> Outcome {
    let open = Output::open(to, shared.stopper.clone());
    let mut output = open.map_err(|text| match context.progress.is_cancelled() {
        true => WorkError::Cancelled,
        false => WorkError::Failed(text),
    })?;
    send_all(&mut output, shared, context).map_err(|error| explain(&mut output, context, error))
}

fn send_all(output: &mut Output, shared: &Shared, context: &WorkContext) -> Outcome {
    let logged = context.track()?.logged;
    // A page that is not there would be taken for one of zeroes.
    context.read_missing()?;
    tell_pass(shared, context);
    context.send(WorkMessage::Migration(Step::Status(MigrationStatus::Active)));
    let about = About {
        ancestors: context.lineage.get().stamps().to_vec(),
        directory: std::env::current_dir().unwrap_or_default().display().to_string(),
        ..About::default()
    };
    let writer = StreamWriter::begin(output, &context.config, about, &context.memory)?;
    let bucket = Bucket::default();
    let mut sending = Sending {
        writer,
        shared,
        context,
        bucket,
        began: Instant::now(),
        first: true,
        is_left: false,
    };
    sending.run(logged)
}

struct Sending<'a> {
    writer: StreamWriter<&'a mut Output>,
    shared: &'a Shared,
    context: &'a WorkContext,
    bucket: Bucket,
    began: Instant,
    /// No page was sent yet.
    first: bool,
    /// The other end may have all of it, and go on.
    is_left: bool,
}

impl Sending<'_> {
    fn run(&mut self, logged: bool) -> Outcome {
        let mut left = self.context.collect()?;
        if logged {
            left = self.rounds()?;
            // The pause has less to wait for then.
            self.writer.out().settle().map_err(StreamError::Write)?;
        }
        let Frozen { state, pages, .. } = self.context.freeze(Freeze::Migrate)?;
        self.tell(Step::Status(MigrationStatus::Device));
        self.pass();
        left.union(&pages);
        if self.first {
            left.insert_all();
        }
        let before = self.writer.sent().bytes;
        self.send(&left, false)?;
        // The run state apart from this hold: what the target is to go on with.
        let doing = self.context.ask(|reply| WorkMessage::Doing { reply })?;
        self.writer.sections(&state.to_sections()?, doing.as_str())?;
        lock(&self.shared.numbers).in_pause = self.writer.sent().bytes - before;
        self.context.progress.check().map_err(|_| WorkError::Cancelled)?;
        self.context.ask(|reply| WorkMessage::LetGo { reply })?;
        self.context.graph.inactivate()?;
        self.end().map_err(|error| {
            let error = explain(self.writer.out(), self.context, error);
            if self.is_left && self.context.progress.is_cancelled() {
                // The process ends, and the target has its disks, or will.
                self.tell(Step::DisksAreGone);
            } else if let Err(reason) = self.context.graph.activate() {
                error!("the disks cannot be taken back: {reason}");
                self.tell(Step::DisksAreGone);
            }
            error
        })
    }

    /// What was given up is the target's once it has all of this.
    fn end(&mut self) -> Outcome {
        if self.writer.out().is_final() {
            // From here on nobody can cancel it.
            self.context.ask(|reply| WorkMessage::Final { reply })?;
            self.is_left = true;
        }
        self.writer.done()?;
        self.note(0);
        self.writer.out().finish().map_err(WorkError::Failed)?;
        info!("migrated: {:?}", self.shared.numbers());
        Ok(())
    }

    /// Sends what is dirty again and again, until the rest is for the pause; gives that.
    fn rounds(&mut self) -> Result<PageSet, WorkError> {
        let mut pages = self.context.collect()?;
        pages.insert_all();
        loop {
            let (began, before) = (Instant::now(), self.writer.sent().bytes);
            self.send(&pages, true)?;
            self.first = false;
            let time = began.elapsed();
            let bytes = self.writer.sent().bytes - before;
            pages = self.context.collect()?;
            let limits = self.shared.limits();
            let speed = match limits.switchover {
                0 => rate(bytes, time),
                speed => speed,
            };
            let pause = Duration::from_secs_f64(pages.bytes() as f64 / speed.max(1) as f64);
            {
                let mut numbers = lock(&self.shared.numbers);
                numbers.dirty_rate = rate(pages.count(), time);
                numbers.expected_pause = Some(pause);
                numbers.remaining = pages.bytes();
            }
            if pause <= limits.downtime {
                return Ok(pages);
            }
            self.pass();
        }
    }

    /// Sends what pages hold; with `limited` no faster than allowed.
    fn send(&mut self, pages: &PageSet, limited: bool) -> Outcome {
        let mut left = pages.bytes();
        let Self { writer, shared, context, bucket, began, first, .. } = self;
        let mut before = writer.sent().bytes;
        writer.pages(&context.memory, pages, *first, |count, sent| {
            left = left.saturating_sub(count * snapshot::PAGE_SIZE);
            {
                let mut numbers = lock(&shared.numbers);
                numbers.sent = sent;
                numbers.remaining = left;
            }
            context.progress.check().map_err(|e| StreamError::Write(std::io::Error::other(e)))?;
            if limited {
                let units = sent.bytes - std::mem::replace(&mut before, sent.bytes);
                wait_for(bucket, shared, *began, units).map_err(StreamError::Write)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    fn note(&self, remaining: u64) {
        let mut numbers = lock(&self.shared.numbers);
        numbers.sent = self.writer.sent();
        numbers.remaining = remaining;
    }

    fn pass(&self) {
        tell_pass(self.shared, self.context);
    }

    fn tell(&self, step: Step) {
        self.context.send(WorkMessage::Migration(step));
    }
}

/// With what the other end has to say.
fn explain(output: &mut Output, context: &WorkContext, error: WorkError) -> WorkError {
    let WorkError::Failed(text) = error else { return error };
    if context.progress.is_cancelled() {
        return WorkError::Cancelled;
    }
    match output.reason().filter(|reason| !text.contains(reason.as_str())) {
        Some(reason) => WorkError::Failed(format!("{text}: {reason}")),
        None => WorkError::Failed(text),
    }
}

/// What was written is asked for.
fn tell_pass(shared: &Shared, context: &WorkContext) {
    let rounds = {
        let mut numbers = lock(&shared.numbers);
        numbers.rounds += 1;
        numbers.rounds
    };
    context.send(WorkMessage::Migration(Step::Pass(rounds)));
}

/// Waits as long as so many bytes take at the speed that is allowed, which may change meanwhile.
fn wait_for(
    bucket: &mut Bucket,
    shared: &Shared,
    began: Instant,
    bytes: u64,
) -> std::io::Result<()> {
    let mut units = bytes;
    loop {
        let allowed = Rate::steady(shared.limits().bandwidth);
        if bucket.rate() != allowed {
            bucket.set_rate(allowed, began.elapsed());
        }
        bucket.take(std::mem::take(&mut units));
        let wait = bucket.wait(began.elapsed());
        if wait.is_zero() {
            return Ok(());
        }
        shared.stopper.rest(wait.min(LOOK))?;
    }
}

/// So many a second.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is a rough number"
)]
pub(in crate::control) fn rate(count: u64, time: Duration) -> u64 {
    (count as f64 / time.as_secs_f64().max(1e-6)) as u64
}
