//! Clusters of the file: taken, given back, and kept apart from those that hold metadata.

use crate::Result;
use crate::qcow2::layout::{HostCluster, Run, push_run};
use crate::qcow2::overlap::OverlapCheck;

use super::Meta;

impl Meta {
    /// The tables whose places the header gives, or will give.
    fn top_tables(&self) -> [(OverlapCheck, Option<Run>); 7] {
        [
            (OverlapCheck::MAIN_HEADER, Some(Run::one(HostCluster(0)))),
            (OverlapCheck::ACTIVE_L1, Some(self.l1_run())),
            (OverlapCheck::ACTIVE_L1, self.next_l1),
            (OverlapCheck::REFCOUNT_TABLE, Some(self.refcounts.table_run())),
            (OverlapCheck::REFCOUNT_TABLE, self.refcounts.next_run()),
            (OverlapCheck::SNAPSHOT_TABLE, self.snapshot_table),
            (OverlapCheck::BITMAP_DIRECTORY, self.places.bitmap_directory),
        ]
    }

    /// The kind of metadata that a run's clusters hold; `but` is not looked for.
    pub(super) fn overlap(&self, run: Run, but: OverlapCheck) -> Option<OverlapCheck> {
        let wanted = self.places.check - but;
        self.places.find(&self.top_tables(), run, wanted).or_else(|| {
            let blocks = OverlapCheck::REFCOUNT_BLOCK;
            (wanted.contains(blocks) && self.refcounts.has_block_in(run)).then_some(blocks)
        })
    }

    /// Refuses a write to clusters that hold metadata of a kind that `overlap-check` has.
    pub(crate) fn check_overlap(&mut self, run: Run) -> Result<()> {
        self.check_overlap_but(run, OverlapCheck::empty())
    }

    /// As [`Meta::check_overlap`], for a write of metadata of one kind to its own place.
    pub(crate) fn check_overlap_but(&mut self, run: Run, but: OverlapCheck) -> Result<()> {
        match self.overlap(run, but) {
            Some(kind) => Err(self.corrupt_at(kind.prevented(), Some(run))),
            None => Ok(()),
        }
    }

    /// Takes free clusters; see [`Refcounts::allocate`].
    pub(crate) fn allocate(&mut self, want: u64, exact: bool) -> Result<Run> {
        let top = self.top_tables();
        let places = &self.places;
        let taken =
            self.refcounts.allocate(want, exact, &|run| places.find(&top, run, places.check));
        self.noted(taken)
    }

    /// Adds a reference to each cluster.
    pub(crate) fn add_refs(&mut self, run: Run) -> Result<()> {
        let added = self.refcounts.add(run);
        self.noted(added)
    }

    /// Gives references back at once: for clusters that nothing on disk refers to.
    pub(crate) fn free(&mut self, run: Run) -> Result<()> {
        self.free_passing(run, self.pass_discard.other)
    }

    /// As [`Meta::free`]; `pass` says whether the host's space goes too.
    pub(crate) fn free_passing(&mut self, run: Run, pass: bool) -> Result<()> {
        let geometry = self.geometry();
        let (l2, freed, places) = (&mut self.l2, &mut self.freed, &mut self.places);
        let packed_end = &mut self.packed_end;
        let given = self.refcounts.sub(run, |run| {
            l2.forget_range(&(geometry.offset_of(run.first)..geometry.offset_of(run.end())));
            places.l2.remove_run(run);
            places.inactive_l2.remove_run(run);
            let has = |end| (run.first..run.end()).contains(&geometry.cluster_of(end));
            if packed_end.is_some_and(has) {
                *packed_end = None;
            }
            if pass {
                push_run(freed, run);
            }
        });
        self.noted(given)
    }

    /// As [`Meta::free`] when something has failed already: an error here only leaks.
    pub(crate) fn free_after_error(&mut self, runs: &[Run]) {
        for run in runs {
            if let Err(e) = self.free(*run) {
                tracing::warn!(image = self.storage.name(), "clusters are leaked: {e}");
            }
        }
    }

    /// Gives references back once no table on disk has them any more.
    pub(crate) fn defer_free(&mut self, run: Run) {
        push_run(&mut self.pending[usize::from(!self.pass_discard.other)], run);
    }

    /// As [`Meta::defer_free`] for what the guest said it does not need.
    pub(crate) fn defer_discard(&mut self, run: Run) {
        push_run(&mut self.pending[usize::from(!self.pass_discard.request)], run);
    }

    pub(super) fn pending_runs(&self) -> usize {
        self.pending.iter().map(Vec::len).sum()
    }
}
