mod block;
mod groups;
mod random;

use std::sync::{Arc, Mutex};

use super::state::{accepts, may_become};
use super::*;
use crate::Error;
use crate::schema::{Event, JobStatus, JobType, JobVerb};

/// What was asked of the work, and what it says.
#[derive(Debug, Default)]
struct Script {
    asked: Vec<&'static str>,
    progress: (u64, u64),
    stubborn: bool,
    /// It settles when [`Jobs::settled`] is told so.
    slow: bool,
    completes: bool,
}

#[derive(Clone, Default)]
struct TestWork(Arc<Mutex<Script>>);

impl TestWork {
    fn ask(&self, what: &'static str) -> bool {
        let mut script = self.0.lock().unwrap();
        script.asked.push(what);
        !script.stubborn
    }

    fn asked(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().asked.clone()
    }
}

impl Work for TestWork {
    fn progress(&self) -> (u64, u64) {
        self.0.lock().unwrap().progress
    }

    fn cancel(&mut self, force: bool) -> bool {
        self.ask(if force { "cancel" } else { "end" })
    }

    fn pause(&mut self) -> bool {
        self.ask("pause")
    }

    fn resume(&mut self) {
        self.ask("resume");
    }

    fn can_complete(&self) -> bool {
        self.0.lock().unwrap().completes
    }

    fn complete(&mut self) {
        self.ask("complete");
    }

    fn set_speed(&mut self, speed: u64) {
        self.ask(if speed == 0 { "unlimited" } else { "slower" });
    }

    fn settle(&mut self, how: Settle) -> Step {
        match self.0.lock().unwrap() {
            script if !script.slow => Step::Done,
            mut script => {
                script.asked.push(if how == Settle::Commit { "commit" } else { "abort" });
                Step::Later
            }
        }
    }
}

type Log = Arc<Mutex<Vec<(String, JobStatus)>>>;

struct Fixture {
    jobs: Jobs,
    log: Log,
    told: Arc<Mutex<Vec<Event>>>,
    work: TestWork,
}

const MANUAL: AutoFlags = AutoFlags { finalize: false, dismiss: false };

impl Fixture {
    fn new() -> Self {
        let log = Log::default();
        let sink = log.clone();
        let told = Arc::new(Mutex::new(Vec::new()));
        let all = told.clone();
        let jobs = Jobs::new(move |event| {
            all.lock().unwrap().push(event.clone());
            if let Event::JobStatusChange { id, status } = event {
                sink.lock().unwrap().push((id.clone(), *status));
            }
        });
        let work = TestWork::default();
        work.0.lock().unwrap().completes = true;
        Self { jobs, log, told, work }
    }

    /// With a job "j" that was started.
    fn running(kind: JobType, auto: AutoFlags) -> Self {
        let mut fixture = Self::new();
        fixture.create("j", kind, auto).unwrap();
        fixture.jobs.start("j").unwrap();
        fixture
    }

    fn create(&mut self, id: &str, kind: JobType, auto: AutoFlags) -> Result<(), Error> {
        self.jobs.create(NewJob { auto, ..NewJob::new(id, kind) }, Box::new(self.work.clone()))
    }

    /// All events since the last call: a state as "id:state", another event as "id:NAME".
    fn told(&mut self) -> String {
        self.states();
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        told.iter().map(tell).collect::<Vec<_>>().join(" ")
    }

    /// The states gone through since the last call.
    fn states(&mut self) -> String {
        let log = std::mem::take(&mut *self.log.lock().unwrap());
        log.iter().map(|(_, status)| status.as_str()).collect::<Vec<_>>().join(" ")
    }
}

fn tell(event: &Event) -> String {
    match event {
        Event::JobStatusChange { id, status } => format!("{id}:{status}"),
        Event::BlockJobPending { id, .. } => format!("{id}:PENDING"),
        Event::BlockJobReady { device, .. } => format!("{device}:READY"),
        Event::BlockJobCompleted { device, error: None, .. } => format!("{device}:COMPLETED"),
        Event::BlockJobCompleted { device, .. } => format!("{device}:FAILED"),
        Event::BlockJobCancelled { device, .. } => format!("{device}:CANCELLED"),
        Event::BlockJobError { device, action, .. } => format!("{device}:ERROR({action})"),
        other => panic!("{other:?}"),
    }
}

fn desc(result: Result<(), Error>) -> String {
    result.expect_err("it was accepted").desc
}

#[test]
fn a_snapshot_job_that_succeeds_stays_concluded_until_dismissed() {
    let mut f = Fixture::running(JobType::SnapshotSave, AutoFlags::of(JobType::SnapshotSave));
    f.work.0.lock().unwrap().progress = (7, 10);
    assert_eq!(f.jobs.query()[0].current_progress, 7);
    f.work.0.lock().unwrap().progress = (10, 10);
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.states(), "created running waiting pending concluded");
    let info = f.jobs.get("j").unwrap();
    assert_eq!((info.status, info.error), (JobStatus::Concluded, None));
    assert_eq!((info.current_progress, info.total_progress), (10, 10));
    assert_eq!(Arc::strong_count(&f.work.0), 1, "the work is dropped");
    f.jobs.dismiss("j").unwrap();
    assert_eq!(f.states(), "null");
    assert!(f.jobs.query().is_empty());
    assert_eq!(desc(f.jobs.dismiss("j")), "Job not found");
}

#[test]
fn a_job_that_fails_shows_its_error_in_the_list_and_keeps_its_progress() {
    let mut f = Fixture::running(JobType::SnapshotLoad, AutoFlags::of(JobType::SnapshotLoad));
    f.work.0.lock().unwrap().progress = (3, 9);
    f.jobs.finish("j", Outcome::Failure("no".into())).unwrap();
    assert_eq!(f.states(), "created running aborting concluded");
    let info = f.jobs.get("j").unwrap();
    assert_eq!(info.error.as_deref(), Some("no"));
    assert_eq!((info.current_progress, info.total_progress), (3, 9));
}

#[test]
fn work_that_has_nothing_to_count_is_one_of_one_when_it_is_done() {
    for kind in [JobType::Create, JobType::SnapshotDelete] {
        let mut f = Fixture::running(kind, AutoFlags::of(kind));
        let progress = |f: &Fixture| {
            let info = f.jobs.get("j").unwrap();
            (info.current_progress, info.total_progress)
        };
        assert_eq!(progress(&f), (0, 1));
        f.jobs.finish("j", Outcome::Success).unwrap();
        assert_eq!(progress(&f), (1, 1), "{kind:?}");
    }
    // The length of a block job is that of what it copies, and that may be nothing.
    let f = Fixture::running(JobType::Backup, MANUAL);
    assert_eq!(f.jobs.get("j").unwrap().total_progress, 0);
}

#[test]
fn a_block_job_disappears_by_itself() {
    let mut f = Fixture::running(JobType::Backup, AutoFlags::of(JobType::Backup));
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.states(), "created running waiting pending concluded null");
    assert!(f.jobs.query().is_empty());
    f.create("j", JobType::Backup, AutoFlags::of(JobType::Backup)).unwrap();
}

#[test]
fn a_cancelled_job_ends_when_its_work_does() {
    let mut f = Fixture::running(JobType::SnapshotSave, AutoFlags::of(JobType::SnapshotSave));
    f.jobs.cancel("j").unwrap();
    f.jobs.cancel("j").unwrap();
    assert_eq!(f.work.asked(), ["cancel"]);
    assert_eq!(f.jobs.get("j").unwrap().status, JobStatus::Running);
    f.jobs.finish("j", Outcome::Cancelled).unwrap();
    assert_eq!(f.states(), "created running aborting concluded");
    assert_eq!(f.jobs.get("j").unwrap().error.as_deref(), Some("Operation canceled"));
    let text = "Job 'j' in state 'concluded' cannot accept command verb 'cancel'";
    assert_eq!(desc(f.jobs.cancel("j")), text);
}

#[test]
fn a_cancel_that_comes_too_late_ends_in_success() {
    let mut f = Fixture::running(JobType::SnapshotSave, AutoFlags::of(JobType::SnapshotSave));
    f.jobs.cancel("j").unwrap();
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.jobs.get("j").unwrap().error, None);
}

#[test]
fn work_that_cannot_stop_now_refuses_the_cancel() {
    let mut f = Fixture::running(JobType::SnapshotLoad, AutoFlags::of(JobType::SnapshotLoad));
    f.work.0.lock().unwrap().stubborn = true;
    let text = "Job 'j' in state 'running' cannot accept command verb 'cancel'";
    assert_eq!(desc(f.jobs.cancel("j")), text);
    let text = "Job 'j' in state 'running' cannot accept command verb 'pause'";
    assert_eq!(desc(f.jobs.pause("j")), text);
    f.work.0.lock().unwrap().stubborn = false;
    f.jobs.cancel("j").unwrap();
}

#[test]
fn jobs_without_work_under_way_are_cancelled_at_once() {
    let mut f = Fixture::new();
    f.create("j", JobType::Backup, MANUAL).unwrap();
    f.jobs.cancel("j").unwrap();
    assert_eq!(f.states(), "created aborting concluded");
    let mut f = Fixture::running(JobType::Backup, MANUAL);
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.states(), "created running waiting pending");
    f.jobs.cancel("j").unwrap();
    assert_eq!(f.states(), "aborting concluded");
    assert_eq!(f.work.asked(), [""; 0]);
}

#[test]
fn a_manual_job_waits_for_finalize_and_dismiss() {
    let mut f = Fixture::running(JobType::Mirror, MANUAL);
    f.jobs.ready("j").unwrap();
    f.jobs.complete("j").unwrap();
    assert_eq!(f.work.asked(), ["complete"]);
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.states(), "created running ready waiting pending");
    let text = "Job 'j' in state 'pending' cannot accept command verb 'dismiss'";
    assert_eq!(desc(f.jobs.dismiss("j")), text);
    f.jobs.finalize("j").unwrap();
    f.jobs.dismiss("j").unwrap();
    assert_eq!(f.states(), "concluded null");
}

#[test]
fn a_pause_takes_effect_when_the_work_rests() {
    let mut f = Fixture::running(JobType::Stream, MANUAL);
    f.states();
    f.jobs.pause("j").unwrap();
    assert_eq!(desc(f.jobs.pause("j")), "Job is already paused");
    assert_eq!(f.states(), "");
    f.jobs.paused("j").unwrap();
    f.jobs.paused("j").unwrap();
    assert_eq!(f.states(), "paused");
    f.jobs.resume("j").unwrap();
    assert_eq!(f.states(), "running");
    // The report of a pause that was taken back meanwhile.
    f.jobs.paused("j").unwrap();
    assert_eq!(f.states(), "");
    assert_eq!(desc(f.jobs.resume("j")), "Can't resume a job that was not paused");
    assert_eq!(f.work.asked(), ["pause", "resume"]);
}

#[test]
fn a_paused_job_goes_on_to_be_cancelled_or_to_end() {
    let mut f = Fixture::running(JobType::Mirror, MANUAL);
    f.jobs.pause("j").unwrap();
    f.jobs.paused("j").unwrap();
    f.jobs.cancel("j").unwrap();
    f.jobs.finish("j", Outcome::Cancelled).unwrap();
    assert_eq!(f.states(), "created running paused running aborting concluded");
    let mut f = Fixture::running(JobType::Mirror, MANUAL);
    f.jobs.ready("j").unwrap();
    f.jobs.pause("j").unwrap();
    f.jobs.paused("j").unwrap();
    f.jobs.complete("j").unwrap();
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert_eq!(f.states(), "created running ready standby ready waiting pending");
}

#[test]
fn resume_of_an_unpaused_job_is_refused_in_every_state_with_its_own_text() {
    let mut f = Fixture::running(JobType::SnapshotSave, MANUAL);
    f.jobs.finish("j", Outcome::Failure(String::new())).unwrap();
    assert_eq!(desc(f.jobs.resume("j")), "Can't resume a job that was not paused");
    assert_eq!(desc(f.jobs.resume("k")), "Job not found");
}

#[test]
fn ids_are_checked_and_unique_until_dismissed() {
    let mut f = Fixture::new();
    for id in ["", "1a", "-a", ".", "a b", "a/b", "ä", "aä", "a\0"] {
        let text = desc(f.create(id, JobType::SnapshotSave, MANUAL));
        assert_eq!(text, format!("Invalid job ID '{id}'"));
    }
    for id in ["a", "Z-1._", &"x".repeat(300)] {
        f.create(id, JobType::SnapshotSave, MANUAL).unwrap();
    }
    f.jobs.cancel("a").unwrap();
    let text = desc(f.create("a", JobType::Backup, MANUAL));
    assert_eq!(text, "Job ID 'a' already in use");
    f.jobs.dismiss("a").unwrap();
    f.create("a", JobType::Backup, MANUAL).unwrap();
}

#[test]
fn the_list_is_newest_first_with_the_wire_names() {
    let mut f = Fixture::new();
    for id in ["a", "b", "c"] {
        f.create(id, JobType::SnapshotDelete, MANUAL).unwrap();
    }
    let ids: Vec<String> = f.jobs.query().into_iter().map(|job| job.id).collect();
    assert_eq!(ids, ["c", "b", "a"]);
    let expected = serde_json::json!({
        "id": "a", "type": "snapshot-delete", "status": "created",
        "current-progress": 0, "total-progress": 1,
    });
    assert_eq!(serde_json::to_value(f.jobs.get("a").unwrap()).unwrap(), expected);
}

#[test]
fn close_forgets_what_is_concluded_and_cancels_the_rest() {
    let mut f = Fixture::running(JobType::SnapshotSave, MANUAL);
    f.create("done", JobType::SnapshotSave, MANUAL).unwrap();
    f.jobs.cancel("done").unwrap();
    f.states();
    assert_eq!(f.jobs.close(), 1);
    assert_eq!(f.states(), "null");
    assert_eq!(f.work.asked(), ["cancel"]);
    f.jobs.finish("j", Outcome::Cancelled).unwrap();
    assert_eq!(f.jobs.close(), 0);
    assert_eq!(f.states(), "aborting concluded null");
}

#[test]
fn reports_that_the_state_does_not_allow_change_nothing() {
    let mut f = Fixture::new();
    assert_eq!(f.jobs.start("j"), Err(StateError::NoJob("j".into())));
    f.create("j", JobType::SnapshotSave, MANUAL).unwrap();
    assert!(f.jobs.finish("j", Outcome::Success).is_err());
    f.jobs.start("j").unwrap();
    assert!(f.jobs.start("j").is_err());
    f.jobs.finish("j", Outcome::Success).unwrap();
    assert!(f.jobs.finish("j", Outcome::Success).is_err());
    assert_eq!(f.states(), "created running waiting pending");
}

#[test]
fn the_tables_are_qemus() {
    use JobStatus as S;
    let edges: Vec<(S, &[S])> = vec![
        (S::Undefined, &[S::Created]),
        (S::Created, &[S::Running, S::Aborting, S::Null]),
        (S::Running, &[S::Paused, S::Ready, S::Waiting, S::Aborting]),
        (S::Paused, &[S::Running]),
        (S::Ready, &[S::Standby, S::Waiting, S::Aborting]),
        (S::Standby, &[S::Ready]),
        (S::Waiting, &[S::Pending, S::Aborting]),
        (S::Pending, &[S::Aborting, S::Concluded]),
        (S::Aborting, &[S::Aborting, S::Concluded]),
        (S::Concluded, &[S::Null]),
        (S::Null, &[]),
    ];
    for (from, expected) in edges {
        for &to in S::ALL {
            assert_eq!(may_become(from, to), expected.contains(&to), "{from} {to}");
        }
    }
    let early = [S::Created, S::Running, S::Paused, S::Ready, S::Standby];
    for &status in S::ALL {
        let cancel = early.contains(&status) || matches!(status, S::Waiting | S::Pending);
        assert_eq!(accepts(status, JobVerb::Cancel), cancel, "{status}");
        for verb in [JobVerb::Pause, JobVerb::Resume, JobVerb::SetSpeed, JobVerb::Change] {
            assert_eq!(accepts(status, verb), early.contains(&status), "{status} {verb}");
        }
        let complete = matches!(status, S::Ready | S::Standby);
        assert_eq!(accepts(status, JobVerb::Complete), complete, "{status}");
        assert_eq!(accepts(status, JobVerb::Finalize), status == S::Pending, "{status}");
        assert_eq!(accepts(status, JobVerb::Dismiss), status == S::Concluded, "{status}");
    }
}
