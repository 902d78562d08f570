//! Block jobs: their events, their commands, and what cancel means for them.

use super::*;
use crate::ErrorClass;
use crate::schema::{BlockDeviceIoStatus, BlockErrorAction, IoOperationType, MirrorCopyMode};

const AUTO: AutoFlags = AutoFlags { finalize: true, dismiss: true };

/// A mirror "j" that is ready; what was told is forgotten.
fn ready(auto: AutoFlags) -> Fixture {
    let mut f = Fixture::running(JobType::Mirror, auto);
    f.jobs.ready("j").unwrap();
    f.told();
    f
}

#[test]
fn a_backup_tells_its_end_between_pending_and_concluded() {
    let mut f = Fixture::running(JobType::Backup, AUTO);
    f.work.0.lock().unwrap().progress = (5, 9);
    f.jobs.finish("j", Outcome::Success).unwrap();
    let completed = Event::BlockJobCompleted {
        kind: JobType::Backup,
        device: "j".into(),
        len: 9,
        offset: 5,
        speed: 0,
        error: None,
    };
    assert!(f.told.lock().unwrap().contains(&completed));
    let all = "j:created j:running j:waiting j:pending j:COMPLETED j:concluded j:null";
    assert_eq!(f.told(), all);
}

#[test]
fn a_job_that_a_client_finalizes_says_that_it_is_pending() {
    let mut f = Fixture::running(JobType::Backup, MANUAL);
    f.told();
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.told(), "j:waiting j:pending j:PENDING");
    f.jobs.finalize("j").unwrap();
    assert_eq!(f.told(), "j:COMPLETED j:concluded");
    f.jobs.dismiss("j").unwrap();
    assert_eq!(f.told(), "j:null");
}

#[test]
fn a_mirror_is_ready_and_completes() {
    let mut f = Fixture::running(JobType::Mirror, AUTO);
    f.told();
    f.jobs.ready("j").unwrap();
    assert_eq!(f.told(), "j:ready j:READY");
    f.jobs.complete("j").unwrap();
    assert_eq!(f.told(), "");
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.told(), "j:waiting j:pending j:COMPLETED j:concluded j:null");
}

#[test]
fn a_failure_is_a_completion_with_an_error() {
    let mut f = Fixture::running(JobType::Stream, AUTO);
    f.told();
    f.jobs.finish("j", Outcome::Failure("no".into())).unwrap();
    assert_eq!(f.told(), "j:aborting j:FAILED j:concluded j:null");
}

#[test]
fn a_cancelled_job_tells_so_and_not_that_it_is_complete() {
    for force in [false, true] {
        let mut f = Fixture::running(JobType::Backup, AUTO);
        f.told();
        f.jobs.block_cancel("j", force).unwrap();
        assert_eq!(f.work.asked(), ["cancel"]);
        f.jobs.finish("j", Outcome::Cancelled).unwrap();
        assert_eq!(f.told(), "j:aborting j:CANCELLED j:concluded j:null");
    }
}

#[test]
fn work_of_a_block_job_that_was_cancelled_too_late_is_undone() {
    let mut f = Fixture::running(JobType::Backup, AUTO);
    f.work.0.lock().unwrap().slow = true;
    f.told();
    f.jobs.cancel("j").unwrap();
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.told(), "j:aborting");
    assert_eq!(f.work.asked(), ["cancel", "abort"]);
    f.jobs.settled("j", Ok(())).unwrap();
    assert_eq!(f.told(), "j:CANCELLED j:concluded j:null");
}

#[test]
fn a_ready_mirror_ends_with_success_unless_it_is_forced() {
    let mut f = ready(AUTO);
    f.jobs.block_cancel("j", false).unwrap();
    assert_eq!(f.work.asked(), ["end"]);
    let text = "The active block job 'j' cannot be completed";
    assert_eq!(desc(f.jobs.complete("j")), text);
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.told(), "j:waiting j:pending j:COMPLETED j:concluded j:null");
    for force in [Jobs::cancel, |jobs: &mut Jobs, id: &str| jobs.block_cancel(id, true)] {
        let mut f = ready(AUTO);
        // The stronger wish counts.
        f.jobs.block_cancel("j", false).unwrap();
        force(&mut f.jobs, "j").unwrap();
        assert_eq!(f.work.asked(), ["end", "cancel"]);
        f.jobs.finish("j", Outcome::Cancelled).unwrap();
        assert_eq!(f.told(), "j:aborting j:CANCELLED j:concluded j:null");
    }
}

#[test]
fn a_mirror_that_waits_to_be_finalized_is_undone_by_a_cancel_forced_or_not() {
    for force in [false, true] {
        let mut f = ready(MANUAL);
        f.jobs.complete("j").unwrap();
        f.jobs.finish("j", Outcome::Success).unwrap();
        assert_eq!(f.told(), "j:waiting j:pending j:PENDING");
        f.jobs.block_cancel("j", force).unwrap();
        assert!(!f.jobs.is_ending_well("j"), "who asked waits for its end");
        assert_eq!(f.told(), "j:aborting j:CANCELLED j:concluded");
    }
}

#[test]
fn a_paused_job_is_cancelled_by_force_only() {
    let mut f = Fixture::running(JobType::Backup, AUTO);
    f.jobs.pause("j").unwrap();
    f.jobs.paused("j").unwrap();
    f.told();
    let text = "The block job for device 'j' is currently paused";
    assert_eq!(desc(f.jobs.block_cancel("j", false)), text);
    f.jobs.block_cancel("j", true).unwrap();
    f.jobs.finish("j", Outcome::Cancelled).unwrap();
    assert_eq!(f.told(), "j:running j:aborting j:CANCELLED j:concluded j:null");
}

#[test]
fn a_pending_job_that_is_cancelled_is_undone() {
    let mut f = Fixture::running(JobType::Backup, MANUAL);
    f.work.0.lock().unwrap().slow = true;
    f.jobs.finish("j", Outcome::Success).unwrap();
    f.told();
    f.jobs.cancel("j").unwrap();
    assert_eq!(f.work.asked(), ["abort"]);
    f.jobs.settled("j", Ok(())).unwrap();
    assert_eq!(f.told(), "j:aborting j:CANCELLED j:concluded");
}

#[test]
fn what_is_taking_effect_cannot_be_cancelled_any_more() {
    let mut f = Fixture::running(JobType::Commit, AUTO);
    f.work.0.lock().unwrap().slow = true;
    f.jobs.finish("j", Outcome::Success).unwrap();
    f.told();
    f.jobs.cancel("j").unwrap();
    f.jobs.settled("j", Ok(())).unwrap();
    assert_eq!(f.told(), "j:COMPLETED j:concluded j:null");
    assert_eq!(f.work.asked(), ["commit"]);
}

#[test]
fn a_job_that_cannot_take_effect_fails() {
    let mut f = Fixture::running(JobType::Commit, MANUAL);
    f.work.0.lock().unwrap().slow = true;
    f.jobs.finish("j", Outcome::Success).unwrap();
    f.jobs.finalize("j").unwrap();
    f.told();
    f.jobs.settled("j", Err("full".into())).unwrap();
    assert_eq!(f.told(), "j:aborting j:FAILED j:concluded");
    assert_eq!(f.jobs.get("j").unwrap().error.as_deref(), Some("full"));
    assert!(f.jobs.settled("j", Ok(())).is_err(), "it was told before");
}

#[test]
fn an_error_that_stops_a_job_pauses_it_until_it_is_resumed() {
    let mut f = Fixture::running(JobType::Mirror, AUTO);
    f.told();
    let failure = |action| IoFailure { operation: IoOperationType::Write, action, nospace: true };
    f.jobs.io_failed("j", failure(BlockErrorAction::Ignore)).unwrap();
    assert!(!f.jobs.query_block()[0].paused);
    f.jobs.io_failed("j", failure(BlockErrorAction::Stop)).unwrap();
    f.jobs.paused("j").unwrap();
    assert_eq!(f.told(), "j:ERROR(ignore) j:ERROR(stop) j:paused");
    let info = &f.jobs.query_block()[0];
    assert!(info.paused && !info.busy, "{info:?}");
    assert_eq!(info.io_status, BlockDeviceIoStatus::Nospace);
    f.jobs.resume("j").unwrap();
    assert_eq!(f.work.asked(), ["resume"]);
    assert_eq!(f.jobs.query_block()[0].io_status, BlockDeviceIoStatus::Ok);
    assert_eq!(f.told(), "j:running");
}

#[test]
fn the_block_commands_know_block_jobs_only() {
    let mut f = Fixture::running(JobType::Create, MANUAL);
    let refusals = [
        f.jobs.block_cancel("j", false),
        f.jobs.set_speed("j", 0),
        f.jobs.change("j", MirrorCopyMode::WriteBlocking),
        f.jobs.require_block("j"),
        f.jobs.require_block("k"),
    ];
    for refusal in refusals {
        let error = refusal.unwrap_err();
        assert_eq!(error.class, ErrorClass::DeviceNotActive);
        assert!(error.desc.starts_with("Block job '"), "{error}");
    }
    assert_eq!(f.jobs.query_block(), []);
    f.create("k", JobType::Stream, MANUAL).unwrap();
    assert_eq!(f.jobs.require_block("k"), Ok(()));
    assert_eq!(f.jobs.query_block().len(), 1);
    assert_eq!(f.jobs.query().len(), 2);
    let text = "Job type does not support change";
    assert_eq!(desc(f.jobs.change("k", MirrorCopyMode::WriteBlocking)), text);
}

#[test]
fn the_speed_is_checked_told_and_listed() {
    let mut f = ready(MANUAL);
    let text = "Parameter 'speed' expects a non-negative value";
    assert_eq!(desc(f.jobs.set_speed("j", -1)), text);
    f.jobs.set_speed("j", 4096).unwrap();
    f.jobs.set_speed("j", 0).unwrap();
    f.jobs.set_speed("j", 77).unwrap();
    assert_eq!(f.work.asked(), ["slower", "unlimited", "slower"]);
    f.jobs.finish("j", Outcome::Success).unwrap();
    let text = "Job 'j' in state 'pending' cannot accept command verb 'set-speed'";
    assert_eq!(desc(f.jobs.set_speed("j", 0)), text);
    let info = serde_json::to_value(&f.jobs.query_block()[0]).unwrap();
    let expected = serde_json::json!({
        "type": "mirror", "device": "j", "len": 0, "offset": 0, "busy": false, "paused": false,
        "speed": 77, "io-status": "ok", "ready": false, "status": "pending",
        "auto-finalize": false, "auto-dismiss": false,
    });
    assert_eq!(info, expected);
}

#[test]
fn a_hidden_job_is_not_listed_and_has_no_events() {
    let mut f = Fixture::new();
    let new = NewJob { hidden: true, ..NewJob::new("#1", JobType::SnapshotSave) };
    f.jobs.create(new, Box::new(f.work.clone())).unwrap();
    f.jobs.start("#1").unwrap();
    assert_eq!(f.jobs.query(), []);
    assert_eq!(desc(f.jobs.cancel("#1")), "Job not found");
    assert_eq!(f.jobs.close(), 1);
    f.jobs.finish("#1", Outcome::Cancelled).unwrap();
    assert_eq!(f.jobs.close(), 0);
    assert_eq!(f.told(), "");
}
