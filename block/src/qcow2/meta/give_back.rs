//! Returning the space of unused clusters to the host.

use crate::Result;
use crate::qcow2::layout::{Geometry, Run, push_run};
use crate::storage::Storage;

use super::Meta;

/// Runs of freed clusters that are kept before their space is given back.
const MAX_FREED_RUNS: usize = 16384;

/// Host space that is given back at once.
const PUNCH_BYTES: u64 = 32 << 20;

/// In so many runs at most: each is a call of the host that takes a while, however small it is.
const PUNCH_RUNS: usize = 16;

/// Gives the host's space of clusters back. An error is of no consequence.
pub(in crate::qcow2) fn discard(storage: &dyn Storage, geometry: Geometry, part: Run) {
    let (at, len) = (geometry.offset_of(part.first).0, geometry.bytes_of(part.count));
    if let Err(e) = storage.discard(at, len) {
        tracing::debug!(image = storage.name(), "space is not given back: {e}");
    }
}

impl Meta {
    /// Gives some of the host's space of free clusters back, unless they are in use again; says
    /// whether there is more. Hosts take long for it and the caller holds the lock, hence in parts.
    pub(crate) fn punch_some(&mut self) -> Result<bool> {
        for part in self.take_freed()? {
            discard(&*self.storage, self.geometry(), part);
        }
        Ok(self.has_freed())
    }

    /// Free clusters whose space is to be given back now, no longer on the list. Nobody may take them
    /// before that is done.
    pub(crate) fn take_freed(&mut self) -> Result<Vec<Run>> {
        self.check_sound()?;
        let mut left = self.geometry().clusters(PUNCH_BYTES).max(1);
        // Snapshots free in the order of the guest; few large calls are faster than many.
        let mut runs = std::mem::take(&mut self.freed);
        runs.sort_unstable_by_key(|run| run.first);
        runs.into_iter().for_each(|run| push_run(&mut self.freed, run));
        let mut runs_left = PUNCH_RUNS;
        let mut parts = Vec::new();
        while left > 0
            && runs_left > 0
            && let Some(mut run) = self.freed.pop()
        {
            runs_left -= 1;
            if run.count > left {
                self.freed.push(Run { first: run.first, count: run.count - left });
                run = Run { first: run.first + (run.count - left), count: left };
            }
            left -= run.count;
            parts.extend(self.refcounts.free_parts(run)?);
        }
        Ok(parts)
    }

    /// Whether there is space that [`Meta::punch_some`] would give back.
    pub(crate) fn has_freed(&self) -> bool {
        !self.freed.is_empty()
    }

    /// Whether the list of freed clusters gets long: a large image may have them all over the file.
    pub(crate) fn has_many_freed(&self) -> bool {
        self.freed.len() > MAX_FREED_RUNS
    }

    /// Keeps the list of freed clusters short.
    pub(crate) fn punch_if_many(&mut self) -> Result<()> {
        if self.has_many_freed() {
            while self.freed.len() > MAX_FREED_RUNS / 2 && self.punch_some()? {}
        }
        Ok(())
    }

    /// Cuts free clusters off the end of the file. An error is of no consequence.
    pub(crate) fn truncate_tail(&mut self) {
        if let Err(e) = self.cut_tail() {
            tracing::debug!(image = self.storage.name(), "file was not shortened: {e}");
        }
    }

    fn cut_tail(&mut self) -> Result<()> {
        self.check_sound()?;
        let Some(end) = self.refcounts.used_end()? else {
            return Ok(());
        };
        let end = self.geometry().offset_of(end).0;
        if end > 0 && end < self.storage.len()? {
            self.storage.set_len(end)?;
        }
        Ok(())
    }
}
