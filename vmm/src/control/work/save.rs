//! snapshot-save: see `docs/live-checkpoints.md` for the order.

use std::time::{SystemTime, UNIX_EPOCH};

use devices::Presence;
use snapshot::fault::guard::WriteGuard;
use snapshot::save::{Machine, Room, Save, SaveSetup, Saved, set_aside};
use snapshot::{About, Lineage, PageSet, SaveError, SaveImages, SectionReader, Stamp};
use tracing::{info, warn};

use super::{
    Freeze, Frozen, IO_THREADS, Outcome, SaveMode, SaveOptions, Target, Tracked, WorkContext,
    WorkError, WorkMessage,
};
use crate::control::rewind::Rewind;
use crate::machine::recorded;
use crate::machine::state::MachineState;

/// Bytes after which another round of copying, guest running, gains nothing.
const FEW: u64 = 1 << 20;
/// Rounds at most before the guest is stopped.
const ROUNDS: usize = 8;
/// Bytes that are copied in a pause at most. Where more is dirty, the guest goes on, and what is dirty
/// is write-protected.
const ASIDE: u64 = 4 << 20;
/// Pages there is room for before the pause, as many as are copied in about a millisecond.
const ROOM: u64 = FEW / snapshot::PAGE_SIZE;

pub(super) fn save(
    target: &Target,
    how: SaveOptions,
    about: About,
    context: &WorkContext,
    point: &mut dyn Point,
) -> Outcome {
    let Target { tag, vmstate, devices } = target;
    let nodes = context.resolve(devices)?;
    snapshot::preflight_save(&nodes, vmstate, tag)?;
    let Tracked { base, logged, state_bytes } = context.track()?;
    let stamp = stamp(tag, 0, SystemTime::now());
    let images = SaveImages::of(&nodes, vmstate);
    let setup = SaveSetup {
        nodes: &nodes,
        vmstate,
        stamp: &stamp,
        base: base.as_ref(),
        compress: how.compress,
        // A page that is not there would be taken for one of zeroes.
        absent: context.missing.as_ref().is_some_and(|missing| missing.ram.missing_bytes() > 0),
        state_bytes,
        ram: &context.memory,
        progress: &context.progress,
        threads: IO_THREADS,
    };
    let save = Save::begin(&images, setup).map_err(failed)?;
    let waits = context.missing.as_ref().is_some_and(|missing| missing.ram.failing().is_some());
    if waits || !save.may_be_absent() {
        // What is missing is the base's, and is shared with it; more has to be read otherwise,
        // and what the guest waits for, or it could not be stopped.
        context.read_missing()?;
    }
    let running = Running { save, point, context, target, about, all: !logged };
    match how.mode {
        SaveMode::Live if logged => running.live(),
        _ => running.stop(),
    }
}

/// What else happens at the moment of a save.
pub(super) trait Point {
    /// Calls `switch`, which makes the moment for the checkpoint. The guest stands still.
    fn switch(&mut self, switch: &mut dyn FnMut() -> Outcome) -> Outcome {
        switch()
    }

    /// The moment has passed, and the guest runs again.
    fn passed(&mut self) {}
}

/// Nothing else.
pub(super) struct Alone;

impl Point for Alone {}

struct Running<'a> {
    save: Save<'a>,
    point: &'a mut dyn Point,
    context: &'a WorkContext,
    target: &'a Target,
    about: About,
    /// All of RAM is to be written, whatever is dirty.
    all: bool,
}

impl Running<'_> {
    /// Makes this the moment of the checkpoint.
    fn switch(&mut self) -> Outcome {
        let Self { save, point, .. } = self;
        point.switch(&mut || save.switch().map_err(failed))
    }

    /// The guest stands still until all is written.
    fn stop(mut self) -> Outcome {
        // A paused job would keep the guest stopped.
        let _uninterrupted = self.context.progress.without_pause();
        let Frozen { state, pages, date } = self.context.freeze(Freeze::Save)?;
        self.switch()?;
        let pages = self.with_all(pages);
        self.save.write(&pages).map_err(failed)?;
        self.finish(&state, date)
    }

    /// The guest stands still for the switch only.
    fn live(mut self) -> Outcome {
        if self.copy_ahead()? {
            let room = Room::new(ROOM);
            let uninterrupted = self.context.progress.without_pause();
            let Frozen { state, pages, date } = self.context.freeze(Freeze::Save)?;
            if pages.bytes() <= ASIDE {
                self.switch()?;
                let aside = set_aside(&self.context.memory, pages, room);
                self.context.send(WorkMessage::Thaw { guarded: false });
                self.point.passed();
                drop(uninterrupted);
                self.save.write_aside(&aside).map_err(failed)?;
                return self.finish(&state, date);
            }
            self.context.send(WorkMessage::Thaw { guarded: false });
            drop(uninterrupted);
            self.save.write(&pages).map_err(failed)?;
        }
        // Memory can be watched for one thing at a time.
        self.context.read_missing()?;
        match Guarded::start(self.context) {
            Ok(guard) => self.guarded(guard),
            Err(error) => {
                warn!(
                    "the guest dirties memory faster than it is saved, and the host does not let us \
                     write-protect it ({error}): it stands still meanwhile"
                );
                self.stop()
            }
        }
    }

    /// What is dirty is write-protected, not copied: the guest writes more than a pause can copy.
    fn guarded(mut self, Guarded { guard, presence }: Guarded<'_>) -> Outcome {
        // What is guarded is copied when the guest writes to it, and the guest waits if that is much.
        let uninterrupted = self.context.progress.without_pause();
        let dirty = self.context.collect()?;
        guard.arm(&dirty)?;
        let Frozen { state, pages: again, date } = self.context.freeze(Freeze::Save)?;
        guard.arm(&again)?;
        self.switch()?;
        guard.switch();
        self.context.send(WorkMessage::Thaw { guarded: true });
        self.point.passed();
        let mut all = dirty;
        all.union(&again);
        self.save.write_kept(&guard, all.count()).map_err(failed)?;
        drop((guard, presence));
        self.context.send(WorkMessage::Unguarded);
        drop(uninterrupted);
        self.finish(&state, date)
    }

    /// Copies while the guest runs, until little is left; false if it does not become little.
    fn copy_ahead(&mut self) -> Result<bool, WorkError> {
        let mut last = u64::MAX;
        for _ in 0..ROUNDS {
            let pages = self.context.collect()?;
            let pages = self.with_all(pages);
            let bytes = pages.bytes();
            self.save.write(&pages).map_err(failed)?;
            if bytes <= FEW {
                return Ok(true);
            }
            if bytes > last / 2 {
                break;
            }
            last = bytes;
        }
        Ok(false)
    }

    /// The pages that differ from what the checkpoint has so far: all of them, at the beginning of a save
    /// that is built upon nothing.
    fn with_all(&self, mut pages: PageSet) -> PageSet {
        if self.all || !self.save.is_incremental() && self.save.stored_bytes() == 0 {
            pages.insert_all();
        }
        pages
    }

    /// Writes `state`, which is that of `date`, and makes the checkpoint known.
    fn finish(self, state: &MachineState, date: SystemTime) -> Outcome {
        let Self { save, context, target, about, .. } = self;
        let stamp = stamp(&target.tag, state.clock.kvmclock_ns, date);
        let ancestors = context.lineage.get();
        let sections = state.to_sections()?;
        // What a load would find.
        let state = MachineState::from_sections(SectionReader::new(&sections), context.shape)?;
        let machine = Machine {
            config: &context.config,
            about: About { ancestors: ancestors.stamps().to_vec(), ..about },
            sections,
            stamp: stamp.clone(),
        };
        let Saved { report, base, rewinder } = save.finish(machine).map_err(failed)?;
        info!("saved {report:?}");
        context.lineage.set(Lineage::at(stamp, ancestors.stamps()));
        let target = target.clone();
        let disks = recorded::disks_of(&context.config);
        let rewind = |rewinder| Rewind::new(target, disks, base.clone(), state, rewinder);
        let rewind = rewinder.map(|rewinder| Box::new(rewind(rewinder)));
        context.send(WorkMessage::Saved { base, report, rewind });
        Ok(())
    }
}

/// Guarded RAM, as the devices know.
struct Guarded<'a> {
    guard: WriteGuard,
    presence: GuardedPresence<'a>,
}

impl<'a> Guarded<'a> {
    /// The devices are told before the guest is paused. So what they have the kernel fill was given to it before
    /// the switch, up to which writes go through, and is filled by then; or is written to before.
    fn start(context: &'a WorkContext) -> std::io::Result<Self> {
        let guard = WriteGuard::start(&context.memory)?;
        context.presence.set_guarded(true);
        Ok(Self { guard, presence: GuardedPresence(&context.presence) })
    }
}

/// Tells the devices when it is dropped that RAM is no longer guarded.
struct GuardedPresence<'a>(&'a Presence);

impl Drop for GuardedPresence<'_> {
    fn drop(&mut self) {
        self.0.set_guarded(false);
    }
}

fn failed(error: SaveError) -> WorkError {
    match error {
        SaveError::Cancelled => WorkError::Cancelled,
        error => error.into(),
    }
}

/// Date and clock of a checkpoint: microseconds, as QEMU's.
fn stamp(tag: &str, vm_clock_nsec: u64, date: SystemTime) -> Stamp {
    let date = date.duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp {
        // What the table keeps of it, by which it is found again.
        tag: snapshot::kept_tag(tag).to_owned(),
        date_sec: u32::try_from(date.as_secs()).unwrap_or(u32::MAX),
        date_nsec: date.subsec_micros() * 1000,
        vm_clock_nsec,
    }
}
