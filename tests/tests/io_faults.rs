//! Calls of the real program to its images fail, at each step of a live save, a lazy load and a deletion:
//! the job tells the disk, the guest goes on, what was there before is there, and the same works afterwards.
//!
//! A sample runs with all tests; `make fault-test` tries every step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::collections::BTreeMap;
use std::time::Duration;

use qmp::client::Client;
use serde_json::json;
use tardigrade_tests::faults::{CHANGES, Call, Fault, Kind, Placed, Plan};
use tardigrade_tests::require;
use tardigrade_tests::site::{End, KEPT, Site, places};
use tardigrade_tests::vm::Vm;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// Who works for a job, and who reads what a load has left in the image.
const JOB: &[&str] = &["snapshot-job", "checkpoint-"];
const READERS: &[&str] = &["ram-"];
const NEW: &str = "new";
const PATIENCE: Duration = Duration::from_secs(120);

fn plan(kinds: &'static [Kind], fault: Option<Placed>) -> Plan {
    Plan { threads: JOB, kinds, fault }
}

/// Calls fail with `errno` from a place on.
fn fails((from, step): Place, errno: i32, times: u64) -> Option<Placed> {
    Some(Placed { from, step, fault: Fault::Error(errno, times) })
}

type Place = (Option<Kind>, u64);

/// How long a fault lasts: one call, or until somebody mends the host.
const LASTS: [u64; 2] = [1, u64::MAX];

/// Has the job that made `calls` fail at a sample of them, with faults that last as long as each of [`LASTS`].
fn fail_at_places(
    site: &mut Site,
    calls: &[Call],
    sample: usize,
    mut fail: impl FnMut(&mut Site, Place, u64),
) {
    for (n, place) in places(calls, sample).into_iter().enumerate() {
        for times in LASTS {
            fail(site, place, times);
        }
        // A new process has nothing in memory: it goes by what the images hold.
        if n % 8 == 7 {
            site.kill();
            site.start(KEPT);
        }
    }
}

/// How often which kind of call has failed.
#[derive(Default)]
struct Tally(BTreeMap<String, u32>);

impl Tally {
    fn add(&mut self, hit: &Call, end: &End) {
        let end = if *end == End::Done { "done" } else { "failed" };
        *self.0.entry(format!("{:?} {end}", hit.kind)).or_default() += 1;
    }

    /// Says what failed; fails where nothing did.
    fn tell(&self, what: &str) {
        println!("{what}: {:?}", self.0);
        for kind in ["Write failed", "Flush failed"] {
            assert!(self.0.contains_key(kind), "{what}: no {kind}");
        }
    }
}

/// The error of a job that a fault ended: it names a disk that failed, and what the host said.
fn check_error(error: &str, calls: &[Call], reason: &str) {
    let names = |hit: &&Call| {
        let node = hit.file.file_stem().unwrap().to_str().unwrap();
        error.contains(&format!("'{node}'")) && error.contains(hit.file.to_str().unwrap())
    };
    assert!(calls.iter().filter(|call| call.hit).any(|hit| names(&hit)), "{error}: {calls:?}");
    assert!(error.contains(reason), "{error}");
}

/// Another process takes over after a flush failed: only it can know what the images hold. Gives whether all
/// have the new checkpoint. Some have it only where the job told that a disk could not be put back.
fn take_over(site: &mut Site, end: &End) -> bool {
    site.kill();
    let has = |tags: Vec<String>| tags.iter().any(|tag| tag == NEW);
    let count = site.disks.iter().filter(|disk| has(disk.tags())).count();
    let whole = count == site.disks.len();
    site.start(if whole { NEW } else { KEPT });
    if count > 0 && !whole {
        let End::Failed(error) = end else { panic!("{count} disks have it: {end:?}") };
        assert!(error.contains("could not be put back as it was"), "{count} have it: {error}");
        let End::Failed(error) = site.job("snapshot-load", NEW) else {
            panic!("a part of a checkpoint was loaded")
        };
        assert!(error.contains("does not exist in one or more devices"), "{error}");
        assert_eq!(site.job("snapshot-delete", NEW), End::Done);
    }
    whole
}

/// A flush that failed is never forgotten: the host may have dropped what it did not write.
fn flush_failed(calls: &[Call]) -> bool {
    calls.iter().any(|call| call.hit && call.kind == Kind::Flush)
}

/// The guest goes on after a job that failed. Where a flush did, no later one is believed, and what the guest writes
/// to the disk fails, as on any disk that loses data: its memory is its own all the same.
fn goes_on(site: &mut Site, calls: &[Call]) {
    if flush_failed(calls) {
        site.memory_goes_on();
    } else {
        site.go_on();
    }
}

/// One save that fails; the guest has not noticed, and a second one is whole.
fn save_fails(site: &mut Site, place: Place, times: u64, tally: &mut Tally) {
    let (errno, reason) = if place.1.is_multiple_of(2) {
        (EIO, "Input/output error")
    } else {
        (ENOSPC, "No space left")
    };
    let fault = plan(CHANGES, fails(place, errno, times));
    let (end, calls) = site.watched(fault, "snapshot-save", NEW);
    goes_on(site, &calls);
    let all = site.disks.len();
    let what = format!("{place:?} of {}, {times} times: {end:?}", calls.len());
    if let Some(hit) = calls.iter().find(|call| call.hit) {
        tally.add(hit, &end);
        match &end {
            End::Failed(error) => {
                check_error(error, &calls, reason);
                assert_eq!(site.count(NEW), 0, "{what}");
            }
            // It was there already, and what was left was to give space back.
            End::Done => assert_eq!(site.count(NEW), all, "{what}: {calls:?}"),
            End::Killed => panic!("{what}"),
        }
    } else {
        assert_eq!(end, End::Done, "{what}");
    }
    assert_eq!(site.count(KEPT), all, "{what}");
    let mut saved = end == End::Done;
    if flush_failed(&calls) {
        if !saved {
            let End::Failed(error) = site.job("snapshot-save", NEW) else {
                panic!("{what}: a flush failed, and the next save worked")
            };
            assert!(error.contains("an earlier flush failed"), "{error}");
            site.memory_goes_on();
        }
        let whole = take_over(site, &end);
        assert!(whole || !saved, "{what}");
        saved = whole;
    }
    if !saved {
        assert_eq!(site.job("snapshot-save", NEW), End::Done, "{what}");
    }
    for tag in [KEPT, NEW] {
        assert_eq!(site.job("snapshot-load", tag), End::Done, "{what}");
        site.go_on();
    }
    assert_eq!(site.job("snapshot-delete", NEW), End::Done, "{what}");
}

fn saves_fail(disks: usize, sample: usize) {
    if !require::kvm() {
        return;
    }
    let mut site = Site::new(disks);
    let (end, calls) = site.watched(plan(CHANGES, None), "snapshot-save", NEW);
    assert_eq!(end, End::Done);
    assert_eq!(site.job("snapshot-delete", NEW), End::Done);
    let mut tally = Tally::default();
    fail_at_places(&mut site, &calls, sample, |site, place, times| {
        save_fails(site, place, times, &mut tally);
    });
    tally.tell(&format!("saves of {disks} disks with {} changes", calls.len()));
    site.finish();
}

#[test]
fn a_live_save_of_one_disk_that_fails_at_any_step_leaves_all_as_it_was() {
    saves_fail(1, 9);
}

#[test]
fn a_live_save_of_eight_disks_that_fails_at_any_step_is_on_none() {
    saves_fail(8, 9);
}

/// One deletion that fails: the checkpoint is on all disks or, if the job says so, on none.
fn delete_fails(site: &mut Site, place: Place, times: u64, tally: &mut Tally) {
    assert_eq!(site.job("snapshot-save", NEW), End::Done);
    let fault = plan(CHANGES, fails(place, EIO, times));
    let (end, calls) = site.watched(fault, "snapshot-delete", NEW);
    goes_on(site, &calls);
    let all = site.disks.len();
    let what = format!("{place:?} of {}, {times} times: {end:?}", calls.len());
    if let Some(hit) = calls.iter().find(|call| call.hit) {
        tally.add(hit, &end);
    }
    match &end {
        End::Failed(error) => {
            check_error(error, &calls, "Input/output error");
            assert_eq!(site.count(NEW), all, "{what}");
        }
        End::Done => assert_eq!(site.count(NEW), 0, "{what}"),
        End::Killed => panic!("{what}"),
    }
    assert_eq!(site.count(KEPT), all, "{what}");
    let mut deleted = end == End::Done;
    if flush_failed(&calls) {
        let whole = take_over(site, &end);
        assert!(!whole || !deleted, "{what}");
        deleted = !whole;
    }
    if !deleted {
        assert_eq!(site.job("snapshot-load", NEW), End::Done, "{what}");
        site.go_on();
        assert_eq!(site.job("snapshot-delete", NEW), End::Done, "{what}");
    }
    assert_eq!(site.job("snapshot-load", KEPT), End::Done, "{what}");
    site.go_on();
}

fn deletions_fail(disks: usize, sample: usize) {
    if !require::kvm() {
        return;
    }
    let mut site = Site::new(disks);
    assert_eq!(site.job("snapshot-save", NEW), End::Done);
    let (end, calls) = site.watched(plan(CHANGES, None), "snapshot-delete", NEW);
    assert_eq!(end, End::Done);
    let mut tally = Tally::default();
    fail_at_places(&mut site, &calls, sample, |site, place, times| {
        delete_fails(site, place, times, &mut tally);
    });
    tally.tell(&format!("deletions on {disks} disks with {} changes", calls.len()));
    site.finish();
}

#[test]
fn a_deletion_from_one_disk_that_fails_at_any_step_can_be_done_again() {
    deletions_fail(1, 6);
}

#[test]
fn a_deletion_from_eight_disks_that_fails_at_any_step_is_from_none() {
    deletions_fail(8, 6);
}

/// One load whose changes fail: before the guest was stopped it goes on as it was; afterwards it is the
/// checkpoint's, and the job tells that a disk may not have it yet.
fn load_fails(
    site: &mut Site,
    kinds: &'static [Kind],
    place: Place,
    times: u64,
    tally: &mut Tally,
) {
    let fault = plan(kinds, fails(place, EIO, times));
    let (end, calls) = site.watched(fault, "snapshot-load", NEW);
    // Where the guest is the checkpoint's and a disk's header is not, the guest's own flushes make up for it.
    goes_on(site, &calls);
    let what = format!("{place:?} of {}, {times} times: {end:?}", calls.len());
    if let Some(hit) = calls.iter().find(|call| call.hit) {
        tally.add(hit, &end);
        if let End::Failed(error) = &end {
            check_error(error, &calls, "Input/output error");
        }
    } else {
        assert_eq!(end, End::Done, "{what}");
    }
    let all = site.disks.len();
    assert_eq!((site.count(KEPT), site.count(NEW)), (all, all), "{what}");
    if flush_failed(&calls) {
        site.kill();
        site.start(NEW);
    }
    for tag in [NEW, KEPT] {
        assert_eq!(site.job("snapshot-load", tag), End::Done, "{what}");
        site.go_on();
    }
}

fn loads_fail(disks: usize, sample: usize) {
    if !require::kvm() {
        return;
    }
    let mut site = Site::new(disks);
    assert_eq!(site.job("snapshot-save", NEW), End::Done);
    let mut tally = Tally::default();
    for kinds in [CHANGES, &[Kind::Read]] {
        site.go_on();
        let (end, calls) = site.watched(plan(kinds, None), "snapshot-load", NEW);
        assert_eq!(end, End::Done);
        fail_at_places(&mut site, &calls, sample, |site, place, times| {
            load_fails(site, kinds, place, times, &mut tally);
        });
        println!("{} calls, {kinds:?}", calls.len());
    }
    tally.tell(&format!("loads of {disks} disks"));
    site.finish();
}

#[test]
fn a_lazy_load_of_one_disk_that_fails_at_any_step_leaves_a_guest_that_goes_on() {
    loads_fail(1, 6);
}

#[test]
fn a_lazy_load_of_eight_disks_that_fails_at_any_step_leaves_a_guest_that_goes_on() {
    loads_fail(8, 6);
}

#[test]
fn memory_that_cannot_be_read_after_a_lazy_load_stops_the_guest_until_it_can() {
    if !require::kvm() {
        return;
    }
    let mut site = Site::new(1);
    assert_eq!(site.job("snapshot-save", NEW), End::Done);
    site.go_on();
    let reads = |fault| Plan { threads: READERS, kinds: &[Kind::Read], fault };
    let (end, _) = site.watched(reads(None), "snapshot-load", NEW);
    assert_eq!(end, End::Done);
    let mut stopped = 0;
    for step in [0, 1, 2, 3, 5, 8, 13, 21] {
        site.go_on();
        site.qmp().take_events();
        site.vm().faults().watch(reads(fails((None, step), EIO, u64::MAX)));
        match site.job("snapshot-load", NEW) {
            End::Done => {
                // Not where all that it needs was read before.
                let waited = site.stops_for_memory(|vm, qmp| {
                    wait_stopped(vm, qmp);
                    // For nothing: it cannot be read yet.
                    qmp.execute("cont", json!({})).unwrap();
                    wait_stopped(vm, qmp);
                    assert!(vm.faults().end().iter().any(|call| call.hit));
                    qmp.execute("cont", json!({})).unwrap();
                });
                stopped += u32::from(waited);
                if !waited {
                    site.vm().faults().end();
                }
            }
            // It was needed to put the machine together.
            End::Failed(error) => {
                assert!(
                    error.contains("RAM of snapshot 'new' could not be read from 'disk0'"),
                    "{error}"
                );
                assert_eq!(site.vm().status(), "restore-vm");
                site.vm().faults().end();
                assert_eq!(site.job("snapshot-load", NEW), End::Done);
                if site.vm().status() != "running" {
                    site.qmp().execute("cont", json!({})).unwrap();
                }
            }
            End::Killed => panic!("step {step}: {}", site.vm().stderr()),
        }
        site.go_on();
        assert_eq!(site.job("snapshot-load", KEPT), End::Done);
    }
    assert!(stopped > 0, "no page was waited for");
    site.finish();
}

/// Waits until the guest stands because a page cannot be read.
fn wait_stopped(vm: &Vm, qmp: &mut Client) {
    let mut wait = |name: &str| qmp.wait_event(PATIENCE, |event| event["event"] == name).unwrap();
    let event = wait("BLOCK_IO_ERROR");
    assert_eq!(event["data"]["operation"], "read", "{event}");
    assert_eq!(event["data"]["node-name"], "disk0", "{event}");
    wait("STOP");
    assert_eq!(vm.status(), "io-error");
}
