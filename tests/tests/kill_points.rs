//! The real program is killed in front of each call by which a live save, a lazy load or a deletion
//! changes an image: what was there before is there, the checkpoint is whole or cannot be loaded, and work goes
//! on from any.
//!
//! A sample runs with all tests; `make fault-test` tries every step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use tardigrade_tests::faults::{CHANGES, Call, Fault, Kind, Placed, Plan};
use tardigrade_tests::require;
use tardigrade_tests::site::{End, KEPT, Site, places};

const JOB: &[&str] = &["snapshot-job", "checkpoint-"];
const NEW: &str = "new";

/// What is done when the process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Save,
    Load,
    Delete,
}

impl Work {
    fn command(self) -> &'static str {
        match self {
            Self::Save => "snapshot-save",
            Self::Load => "snapshot-load",
            Self::Delete => "snapshot-delete",
        }
    }
}

/// Does the work, with a checkpoint [`NEW`] there before if it needs one.
fn work(site: &mut Site, work: Work, fault: Option<Placed>) -> (End, Vec<Call>) {
    if work != Work::Save && site.count(NEW) == 0 {
        assert_eq!(site.job("snapshot-save", NEW), End::Done);
        site.go_on();
    }
    let plan = Plan { threads: JOB, kinds: CHANGES, fault };
    site.watched(plan, work.command(), NEW)
}

/// Kills the process at a place; false where the work has fewer.
fn killed_at(site: &mut Site, what: Work, place: (Option<Kind>, u64)) -> bool {
    let (from, step) = place;
    let (end, _) = work(site, what, Some(Placed { from, step, fault: Fault::Kill }));
    let killed = end == End::Killed;
    assert!(killed || end == End::Done, "{end:?}");
    site.kill();
    let all = site.disks.len();
    let tags: Vec<Vec<String>> = site.disks.iter().map(|disk| disk.tags()).collect();
    let on = |tag: &str| tags.iter().filter(|tags| tags.iter().any(|there| there == tag)).count();
    assert_eq!(on(KEPT), all, "{what:?} {place:?}: {tags:?}");
    if what == Work::Load {
        assert_eq!(on(NEW), all, "{what:?} {place:?}: {tags:?}");
    }
    let whole = on(NEW) == all;
    site.start(if whole { NEW } else { KEPT });
    if !whole && on(NEW) > 0 {
        let End::Failed(error) = site.job("snapshot-load", NEW) else {
            panic!("{what:?} {place:?}: a part of a checkpoint was loaded: {tags:?}")
        };
        assert!(error.contains("does not exist in one or more devices"), "{error}");
        site.go_on();
    }
    assert_eq!(site.job("snapshot-load", KEPT), End::Done);
    site.go_on();
    // A load begins with the checkpoint that it had.
    if what != Work::Load {
        assert_eq!(site.job("snapshot-delete", NEW), End::Done);
        assert_eq!(site.count(NEW), 0);
    }
    killed
}

fn kills(disks: usize, what: Work, sample: usize) {
    if !require::kvm() {
        return;
    }
    let mut site = Site::new(disks);
    let (end, calls) = work(&mut site, what, None);
    assert_eq!(end, End::Done);
    if what == Work::Save {
        assert_eq!(site.job("snapshot-delete", NEW), End::Done);
    }
    site.go_on();
    let places = places(&calls, sample);
    let killed = places.into_iter().filter(|place| killed_at(&mut site, what, *place)).count();
    println!("{what:?}, {disks} disks, {} changes: killed {killed} times", calls.len());
    assert!(killed > 0);
    site.finish();
}

#[test]
fn a_process_killed_at_any_step_of_a_live_save_of_one_disk_has_its_checkpoints() {
    kills(1, Work::Save, 6);
}

#[test]
fn a_process_killed_at_any_step_of_a_live_save_of_eight_disks_has_it_on_all_or_cannot_load_it() {
    kills(8, Work::Save, 6);
}

#[test]
fn a_process_killed_at_any_step_of_a_lazy_load_has_its_checkpoints() {
    kills(1, Work::Load, 6);
    kills(8, Work::Load, 6);
}

#[test]
fn a_process_killed_at_any_step_of_a_deletion_has_all_other_checkpoints() {
    kills(1, Work::Delete, 6);
    kills(8, Work::Delete, 6);
}
