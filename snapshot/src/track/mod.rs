//! What was written to guest RAM since a checkpoint: the basis of incremental saves and of rewinding.
//!
//! ```text
//!              saved, loaded                     take                    saved
//!   no base ───────────────────> base + dirty ──────────> base + taken ──────────> new base
//!   (all is dirty)    ^              │   ^                     │
//!      ^              │ note: more   │   └─────────────────────┘ failed: taken is dirty again
//!      └──────────────┴──────────────┘
//!        forget: boot, reset, a load that failed, delete of the base
//! ```
//!
//! The tracker knows nothing of where the pages come from. Whoever writes to RAM without telling it
//! makes the next checkpoint wrong; `docs/live-checkpoints.md` says who tells.

mod pages;

use block::SnapshotInfo;

pub use pages::{PageRun, PageSet};

/// The checkpoint that RAM equals, but for the dirty pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Name of the node with its VM state.
    pub node: String,
    /// The snapshot there.
    pub snapshot: SnapshotInfo,
    /// Where its RAM starts in the VM-state area, in bytes.
    pub ram_offset: u64,
}

impl Base {
    /// Whether `snapshot`, on the node of the same name, is this checkpoint. Ids are used again
    /// after a delete, so the times count too.
    pub fn is(&self, snapshot: &SnapshotInfo) -> bool {
        self.snapshot == *snapshot
    }
}

/// The base and the pages written since; the module has the states.
#[derive(Debug)]
pub struct Tracker {
    base: Option<Base>,
    dirty: PageSet,
    /// What the save that is under way has taken.
    taken: PageSet,
}

impl Tracker {
    /// A tracker without a base. `shape` is any set over the guest's RAM.
    pub fn new(shape: &PageSet) -> Self {
        let mut tracker = Self { base: None, dirty: shape.empty_like(), taken: shape.empty_like() };
        tracker.forget();
        tracker
    }

    /// The base, if there is one.
    pub fn base(&self) -> Option<&Base> {
        self.base.as_ref()
    }

    /// Pages that may differ from the base, and those that a save has taken left out. Without a base
    /// it is all of them.
    pub fn dirty(&self) -> &PageSet {
        &self.dirty
    }

    /// Pages that were written.
    pub fn note(&mut self, written: &PageSet) {
        self.dirty.union(written);
    }

    /// The dirty pages, for a save to write. They are clean from now on, unless [`Tracker::failed`]
    /// follows.
    pub fn take(&mut self) -> PageSet {
        let taken = self.dirty.take();
        self.taken.union(&taken);
        taken
    }

    /// What was taken is in the checkpoint `base`, which is the base from now on. Pages that were
    /// noted since the last [`Tracker::take`] stay dirty.
    pub fn saved(&mut self, base: Base) {
        self.base = Some(base);
        self.taken.clear();
    }

    /// The save came to nothing: what it had taken differs from the old base still.
    pub fn failed(&mut self) {
        let taken = self.taken.take();
        self.dirty.union(&taken);
    }

    /// RAM is that of the checkpoint now.
    pub fn loaded(&mut self, base: Base) {
        self.base = Some(base);
        self.dirty.clear();
        self.taken.clear();
    }

    /// RAM is that of no checkpoint.
    pub fn forget(&mut self) {
        self.base = None;
        self.dirty.insert_all();
        self.taken.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(id: &str) -> Base {
        let snapshot = SnapshotInfo {
            id: id.to_owned(),
            tag: format!("tag{id}"),
            vm_state_size: 1,
            disk_size: 1,
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            icount: None,
        };
        Base { node: "disk0".to_owned(), snapshot, ram_offset: 4 << 20 }
    }

    fn pages(numbers: &[u64]) -> PageSet {
        let mut set = PageSet::empty([100]);
        for first in numbers {
            set.insert(PageRun { region: 0, first: *first, count: 1 });
        }
        set
    }

    fn tracker() -> Tracker {
        Tracker::new(&pages(&[]))
    }

    #[test]
    fn without_a_base_everything_is_dirty() {
        let mut tracker = tracker();
        assert_eq!(tracker.base(), None);
        assert_eq!(tracker.take().count(), 100);
        tracker.failed();
        assert_eq!(tracker.dirty().count(), 100);
    }

    #[test]
    fn after_a_save_what_was_written_since_the_last_round_is_dirty() {
        let mut tracker = tracker();
        tracker.take();
        tracker.note(&pages(&[3, 4]));
        assert_eq!(tracker.take(), pages(&[3, 4]));
        tracker.note(&pages(&[4, 5]));
        tracker.saved(base("1"));
        assert_eq!(tracker.base(), Some(&base("1")));
        assert_eq!(*tracker.dirty(), pages(&[4, 5]));
        // Nothing of the save before comes back with a later failure.
        tracker.take();
        tracker.failed();
        assert_eq!(*tracker.dirty(), pages(&[4, 5]));
    }

    #[test]
    fn a_failed_save_gives_back_what_all_its_rounds_took() {
        let mut tracker = tracker();
        tracker.loaded(base("1"));
        tracker.note(&pages(&[1]));
        tracker.take();
        tracker.note(&pages(&[2]));
        tracker.take();
        tracker.note(&pages(&[3]));
        tracker.failed();
        assert_eq!(tracker.base(), Some(&base("1")));
        assert_eq!(*tracker.dirty(), pages(&[1, 2, 3]));
    }

    #[test]
    fn a_load_starts_clean_and_a_reset_forgets() {
        let mut tracker = tracker();
        tracker.note(&pages(&[1]));
        tracker.loaded(base("2"));
        assert!(tracker.dirty().is_empty());
        tracker.take();
        tracker.forget();
        assert_eq!(tracker.base(), None);
        assert_eq!(tracker.dirty().count(), 100);
        tracker.failed();
        assert_eq!(tracker.dirty().count(), 100);
    }

    #[test]
    fn an_id_that_is_used_again_is_another_checkpoint() {
        let (old, mut new) = (base("1"), base("1").snapshot);
        assert!(old.is(&new));
        new.date_nsec += 1;
        assert!(!old.is(&new));
    }
}
