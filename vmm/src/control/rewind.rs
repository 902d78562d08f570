//! Going back to the checkpoint that the guest runs from: a load that costs what the guest has
//! written since, done by the main thread itself.
//!
//! It is tried for every load, and asks nothing that a load does not: the arguments of the last load or
//! save, that checkpoint on the same images, RAM based on it, no disk written, not too many pages. Where
//! one of these does not hold, the load goes the long way.

use std::sync::atomic::Ordering;

use block::Node;
use qmp::schema::{LoadMode, RunState};
use snapshot::rewind::MOST_PAGES;
use snapshot::{Base, Rewinder, Stamp};
use tracing::{debug, error};

use super::Controller;
use super::hot::Hot;
use super::snapshot_jobs::Current;
use super::work::{LoadOptions, Outcome, Target, Task, WorkError};
use crate::machine::recorded;
use crate::machine::state::MachineState;
use crate::memory::dirty_log::Protect;

/// What is kept of the checkpoint saved or loaded last.
pub struct Rewind {
    /// What was asked for.
    target: Target,
    /// The machine's disks.
    disks: Vec<String>,
    base: Base,
    state: MachineState,
    rewinder: Rewinder,
    /// How often it was gone back to.
    count: u64,
    hot: Hot,
}

impl Rewind {
    /// A checkpoint that RAM is based on, of a machine with these disks.
    pub fn new(
        target: Target,
        disks: Vec<String>,
        base: Base,
        state: MachineState,
        rewinder: Rewinder,
    ) -> Self {
        Self { target, disks, base, state, rewinder, count: 0, hot: Hot::default() }
    }

    /// Its vCPUs and devices.
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// What RAM equals.
    pub fn base(&self) -> &Base {
        &self.base
    }
}

impl Controller {
    /// Whether a load can be done by [`Controller::rewind_now`], as far as it can be known while the
    /// guest runs.
    pub(super) fn can_rewind(&mut self, target: &Target, mode: LoadMode) -> bool {
        // Eager promises that nothing is missing.
        let unread = mode == LoadMode::Eager && self.machine.missing().is_some();
        let running = matches!(self.state, RunState::Running | RunState::Paused);
        if !running || unread || !self.is_last_load(target) {
            return false;
        }
        // Few pages now can be many later; many pages stay many. After one way back another one is
        // likely, and it will be seen when the guest stands still.
        self.rewind.as_ref().is_some_and(|rewind| rewind.count > 0)
            || self.machine.note_written(Protect::Not).is_ok() && self.may_put_back()
    }

    /// Whether the load of `target` was the last, RAM is based on it, and its disks are unchanged.
    fn is_last_load(&mut self, target: &Target) -> bool {
        let Some(rewind) = &self.rewind else { return false };
        if rewind.target != *target || self.machine.tracker().base() != Some(&rewind.base) {
            return false;
        }
        // Another node may have taken a disk's place: then the guest wrote there.
        if rewind.disks != recorded::disks(&self.machine) {
            return false;
        }
        let graph = self.blocks.graph();
        let nodes = snapshot::resolve(&target.devices, |name| graph.get(name));
        nodes.is_ok_and(|nodes: Vec<std::sync::Arc<Node>>| {
            rewind.rewinder.is_current(&nodes, &target.vmstate, &target.tag)
        })
    }

    fn may_put_back(&mut self) -> bool {
        self.machine.tracker().dirty().count() <= MOST_PAGES
    }

    /// Does the load that [`Controller::can_rewind`] was asked of, if there is one, or starts it the
    /// long way.
    pub(super) fn rewind_now(&mut self) {
        // The end of one job can be the beginning of the next.
        while let Some(Task::Load(target, how)) = self.jobs.rewinding.take() {
            match self.try_rewind(&target, how) {
                Some(outcome) => self.job_done(outcome),
                None => {
                    let Some(Current { id, handle, .. }) = self.jobs.current.take() else { return };
                    self.start_job(id, Task::Load(target, how), handle);
                }
            }
        }
    }

    /// None where it has to go the long way; nothing was touched then.
    fn try_rewind(&mut self, target: &Target, how: LoadOptions) -> Option<Outcome> {
        let current = self.jobs.current.as_ref()?;
        let handle = current.handle.clone();
        if self.ending || handle.progress.is_cancelled() {
            return Some(Err(WorkError::Cancelled));
        }
        if let Err(error) = self.hold_guest(RunState::RestoreVm) {
            return Some(Err(error));
        }
        // The guest stands still: what holds now stays so.
        let protect = self.rewind.as_mut()?.hot.protect();
        let noted = self.machine.note_written(protect);
        if noted.is_err() || !self.may_put_back() || !self.is_last_load(target) {
            return None;
        }
        let rewind = self.rewind.as_mut()?;
        if let Err(error) = self.machine.put_back(&mut rewind.rewinder) {
            debug!("the long way back to '{}': {error}", target.tag);
            return None;
        }
        let put_back = self.machine.dirty().bytes();
        let hot = rewind.hot.note(protect, self.machine.dirty(), self.machine.unlogged());
        let hot = hot.filter(|_| self.machine.unlogging_helps());
        handle.committed.store(true, Ordering::Release);
        handle.memory_lost.store(true, Ordering::Release);
        self.inbox.guest_replaced();
        let bytes = self.machine.spec().ram_bytes;
        handle.progress.add_total(bytes);
        handle.progress.advance(bytes);
        let base = rewind.base.clone();
        let saved = Stamp::of(&base.snapshot);
        let restored = self.machine.restore_rewound(&rewind.state, base, hot.as_ref());
        if restored.is_ok() {
            self.machine.set_clock(how.clock, &saved);
            rewind.count += 1;
            self.rewinds += 1;
            self.rewound_bytes += put_back;
        }
        Some(restored.map_err(|failure| {
            error!("the machine cannot be put together again: {failure}");
            WorkError::from(failure)
        }))
    }
}
