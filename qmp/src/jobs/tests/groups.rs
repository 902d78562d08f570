//! Jobs of one transaction: QEMU's order of events, the newest job first.

use super::*;

/// Backups "a", "b", "c" in one group, all running; what was told is forgotten.
fn three(flags: [AutoFlags; 3], slow: bool) -> Fixture {
    let mut f = Fixture::new();
    f.work.0.lock().unwrap().slow = slow;
    let group = Some(f.jobs.new_group());
    for (id, auto) in ["a", "b", "c"].into_iter().zip(flags) {
        let new = NewJob { auto, group, ..NewJob::new(id, JobType::Backup) };
        f.jobs.create(new, Box::new(f.work.clone())).unwrap();
    }
    for id in ["c", "b", "a"] {
        f.jobs.start(id).unwrap();
    }
    f.told();
    f
}

const AUTO: AutoFlags = AutoFlags { finalize: true, dismiss: true };
const KEEP: AutoFlags = AutoFlags { finalize: true, dismiss: false };
const ASK: AutoFlags = AutoFlags { finalize: false, dismiss: true };

#[test]
fn all_wait_for_the_last_and_end_the_newest_first() {
    let mut f = three([AUTO; 3], false);
    f.jobs.finish("b", Outcome::Success).unwrap();
    f.jobs.finish("c", Outcome::Success).unwrap();
    assert_eq!(f.told(), "b:waiting c:waiting");
    f.jobs.finish("a", Outcome::Success).unwrap();
    let all = "a:waiting c:pending b:pending a:pending c:COMPLETED c:concluded c:null \
               b:COMPLETED b:concluded b:null a:COMPLETED a:concluded a:null";
    assert_eq!(f.told(), all);
    assert_eq!(f.jobs.query(), []);
}

#[test]
fn one_is_asked_to_commit_after_the_other() {
    let mut f = three([AUTO; 3], true);
    for id in ["a", "b", "c"] {
        f.jobs.finish(id, Outcome::Success).unwrap();
    }
    f.told();
    for (id, asked) in [("c", 1), ("b", 2), ("a", 3)] {
        assert_eq!(f.work.asked(), vec!["commit"; asked]);
        assert!(f.told().is_empty());
        f.jobs.settled(id, Ok(())).unwrap();
        assert_eq!(f.told(), format!("{id}:COMPLETED {id}:concluded {id}:null"));
    }
}

#[test]
fn the_failure_of_one_cancels_the_others() {
    let mut f = three([KEEP; 3], false);
    f.jobs.finish("c", Outcome::Success).unwrap();
    f.told();
    f.jobs.finish("a", Outcome::Failure("broken".into())).unwrap();
    // "b" has still to end; what waited goes before it, the one that failed after it.
    assert_eq!(f.told(), "a:aborting c:aborting c:CANCELLED c:concluded");
    assert_eq!(f.work.asked(), ["cancel"]);
    f.jobs.finish("b", Outcome::Success).unwrap();
    assert_eq!(f.told(), "b:aborting b:CANCELLED b:concluded a:FAILED a:concluded");
    let error = |id| f.jobs.get(id).unwrap().error.unwrap();
    assert_eq!([error("a"), error("b")], ["broken", "Operation canceled"]);
}

#[test]
fn a_cancel_of_one_cancels_all_and_those_that_wait() {
    let mut f = three([AUTO; 3], false);
    f.jobs.finish("b", Outcome::Success).unwrap();
    f.jobs.cancel("c").unwrap();
    assert_eq!(f.told(), "b:waiting");
    f.jobs.finish("c", Outcome::Cancelled).unwrap();
    f.jobs.finish("a", Outcome::Cancelled).unwrap();
    let all = "c:aborting c:CANCELLED c:concluded c:null \
               b:aborting b:CANCELLED b:concluded b:null \
               a:aborting a:CANCELLED a:concluded a:null";
    assert_eq!(f.told(), all);
    let mut f = three([AUTO; 3], false);
    f.jobs.finish("b", Outcome::Success).unwrap();
    f.told();
    f.jobs.cancel("b").unwrap();
    assert_eq!(f.work.asked(), ["cancel", "cancel"]);
    assert_eq!(f.told(), "");
}

#[test]
fn a_paused_member_is_woken_to_be_cancelled() {
    let mut f = three([AUTO; 3], false);
    f.jobs.pause("a").unwrap();
    f.jobs.paused("a").unwrap();
    f.told();
    f.jobs.finish("b", Outcome::Failure("no".into())).unwrap();
    assert_eq!(f.told(), "b:aborting a:running");
    assert_eq!(f.work.asked(), ["pause", "cancel", "resume", "cancel"]);
}

#[test]
fn one_that_a_client_finalizes_holds_all_and_one_finalize_ends_all() {
    let mut f = three([AUTO, ASK, AUTO], false);
    for id in ["a", "b", "c"] {
        f.jobs.finish(id, Outcome::Success).unwrap();
    }
    let all = "a:waiting b:waiting c:waiting c:pending b:pending b:PENDING a:pending";
    assert_eq!(f.told(), all);
    f.jobs.finalize("a").unwrap();
    let all = "c:COMPLETED c:concluded c:null b:COMPLETED b:concluded b:null \
               a:COMPLETED a:concluded a:null";
    assert_eq!(f.told(), all);
    let mut f = three([AUTO, ASK, AUTO], false);
    for id in ["a", "b", "c"] {
        f.jobs.finish(id, Outcome::Success).unwrap();
    }
    f.told();
    f.jobs.cancel("c").unwrap();
    let all = "c:aborting c:CANCELLED c:concluded c:null \
               b:aborting b:CANCELLED b:concluded b:null \
               a:aborting a:CANCELLED a:concluded a:null";
    assert_eq!(f.told(), all);
}

#[test]
fn one_that_cannot_commit_fails_those_after_it() {
    let mut f = three([KEEP; 3], true);
    for id in ["a", "b", "c"] {
        f.jobs.finish(id, Outcome::Success).unwrap();
    }
    f.jobs.settled("c", Ok(())).unwrap();
    f.told();
    f.jobs.settled("b", Err("full".into())).unwrap();
    assert_eq!(f.told(), "b:aborting b:FAILED b:concluded a:aborting");
    assert_eq!(f.work.asked(), ["commit", "commit", "abort"]);
    f.jobs.settled("a", Ok(())).unwrap();
    assert_eq!(f.told(), "a:CANCELLED a:concluded");
}

#[test]
fn what_was_never_started_goes_without_events_of_block_jobs() {
    let mut f = Fixture::new();
    let group = Some(f.jobs.new_group());
    for id in ["a", "b"] {
        let new = NewJob { group, ..NewJob::new(id, JobType::Backup) };
        f.jobs.create(new, Box::new(f.work.clone())).unwrap();
    }
    f.told();
    f.jobs.abandon("b").unwrap();
    f.jobs.abandon("a").unwrap();
    assert_eq!(f.told(), "b:aborting b:concluded b:null a:aborting a:concluded a:null");
    assert!(f.jobs.groups.is_empty());
    let mut f = Fixture::running(JobType::Backup, AUTO);
    assert!(f.jobs.abandon("j").is_err(), "it was started");
}

#[test]
fn who_waits_for_the_end_is_called_once_all_are_concluded() {
    let calls = Arc::new(Mutex::new(0));
    let call = |calls: &Arc<Mutex<i32>>| {
        let calls = calls.clone();
        move || *calls.lock().unwrap() += 1
    };
    let mut f = three([AUTO; 3], false);
    f.jobs.when_over("a", call(&calls));
    f.jobs.when_over("c", call(&calls));
    f.jobs.finish("c", Outcome::Success).unwrap();
    f.jobs.finish("b", Outcome::Success).unwrap();
    assert_eq!(*calls.lock().unwrap(), 0);
    f.jobs.finish("a", Outcome::Success).unwrap();
    assert_eq!(*calls.lock().unwrap(), 2);
    f.jobs.when_over("a", call(&calls));
    assert_eq!(*calls.lock().unwrap(), 3, "it is gone");
}
