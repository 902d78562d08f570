//! Random orders of verbs, reports and ends, over jobs of their own and groups.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::schema::{BlockErrorAction, IoOperationType, MirrorCopyMode};

const IDS: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Debug, Clone)]
enum Act {
    /// Flags, whether it joins the open group, whether it settles slowly, the type.
    Create(bool, bool, bool, bool, JobType),
    /// Later jobs join another group.
    OtherGroup,
    Start,
    Abandon,
    Paused,
    Ready,
    IoFailed(BlockErrorAction),
    Finish(u8),
    Settled(bool),
    Verb(JobVerb),
    BlockCancel(bool),
    Stubborn(bool),
    Close,
}

fn act() -> impl Strategy<Value = Act> {
    let kinds = vec![JobType::Mirror, JobType::Backup, JobType::SnapshotSave];
    let create = (any::<(bool, bool, bool, bool)>(), prop::sample::select(kinds))
        .prop_map(|((f, d, joins, slow), kind)| Act::Create(f, d, joins, slow, kind));
    prop_oneof![
        4 => create,
        1 => Just(Act::OtherGroup),
        4 => Just(Act::Start),
        1 => Just(Act::Abandon),
        2 => Just(Act::Paused),
        2 => Just(Act::Ready),
        1 => prop::sample::select(BlockErrorAction::ALL).prop_map(Act::IoFailed),
        3 => (0..4_u8).prop_map(Act::Finish),
        3 => any::<bool>().prop_map(Act::Settled),
        7 => prop::sample::select(JobVerb::ALL).prop_map(Act::Verb),
        2 => any::<bool>().prop_map(Act::BlockCancel),
        1 => any::<bool>().prop_map(Act::Stubborn),
        1 => Just(Act::Close),
    ]
}

/// A list, and what is known of it from outside.
struct Model {
    f: Fixture,
    group: GroupId,
    /// The work of the last job of each id.
    works: BTreeMap<&'static str, TestWork>,
    /// How many ends were waited for, and how many came.
    waited: usize,
    ended: Arc<Mutex<usize>>,
}

impl Model {
    fn new() -> Self {
        let mut f = Fixture::new();
        let group = f.jobs.new_group();
        Self { f, group, works: BTreeMap::new(), waited: 0, ended: Arc::default() }
    }

    /// Whether it was refused.
    fn act(&mut self, id: &'static str, act: &Act) -> bool {
        let jobs = &mut self.f.jobs;
        match *act {
            Act::Create(finalize, dismiss, joins, slow, kind) => {
                let work = TestWork::default();
                let completes = kind == JobType::Mirror;
                *work.0.lock().unwrap() = Script { slow, completes, ..Script::default() };
                let new = NewJob {
                    auto: AutoFlags { finalize, dismiss },
                    group: joins.then_some(self.group),
                    ..NewJob::new(id, kind)
                };
                if jobs.create(new, Box::new(work.clone())).is_err() {
                    return true;
                }
                self.works.insert(id, work);
                let ended = self.ended.clone();
                jobs.when_over(id, move || *ended.lock().unwrap() += 1);
                self.waited += 1;
                false
            }
            Act::OtherGroup => {
                self.group = jobs.new_group();
                false
            }
            Act::Start => jobs.start(id).is_err(),
            Act::Abandon => jobs.abandon(id).is_err(),
            Act::Paused => jobs.paused(id).is_err(),
            Act::Ready => jobs.ready(id).is_err(),
            Act::IoFailed(action) => {
                let operation = IoOperationType::Read;
                jobs.io_failed(id, IoFailure { operation, action, nospace: false }).is_err()
            }
            Act::Finish(0 | 1) => jobs.finish(id, Outcome::Success).is_err(),
            Act::Finish(2) => jobs.finish(id, Outcome::Cancelled).is_err(),
            Act::Finish(_) => jobs.finish(id, Outcome::Failure("no".into())).is_err(),
            Act::Settled(true) => jobs.settled(id, Ok(())).is_err(),
            Act::Settled(false) => jobs.settled(id, Err("no".into())).is_err(),
            Act::Verb(JobVerb::Cancel) => jobs.cancel(id).is_err(),
            Act::Verb(JobVerb::Pause) => jobs.pause(id).is_err(),
            Act::Verb(JobVerb::Resume) => jobs.resume(id).is_err(),
            Act::Verb(JobVerb::Complete) => jobs.complete(id).is_err(),
            Act::Verb(JobVerb::Dismiss) => jobs.dismiss(id).is_err(),
            Act::Verb(JobVerb::Finalize) => jobs.finalize(id).is_err(),
            Act::Verb(JobVerb::SetSpeed) => jobs.set_speed(id, 1).is_err(),
            Act::Verb(JobVerb::Change) => jobs.change(id, MirrorCopyMode::WriteBlocking).is_err(),
            Act::BlockCancel(force) => jobs.block_cancel(id, force).is_err(),
            Act::Stubborn(stubborn) => {
                for work in self.works.values() {
                    work.0.lock().unwrap().stubborn = stubborn;
                }
                false
            }
            Act::Close => {
                jobs.close();
                false
            }
        }
    }

    /// Every job's life, as told, is a walk through the table; a block job that was started tells
    /// its end once, just before it is concluded; what is listed is where the walk is.
    fn check(&self) {
        let told = self.f.told.lock().unwrap();
        for id in IDS {
            let (mut at, mut started, mut ends) = (JobStatus::Undefined, false, 0);
            for event in told.iter().filter(|event| tell(event).starts_with(id)) {
                let Event::JobStatusChange { status, .. } = event else {
                    ends += usize::from(matches!(
                        event,
                        Event::BlockJobCompleted { .. } | Event::BlockJobCancelled { .. }
                    ));
                    continue;
                };
                if at == JobStatus::Null {
                    (at, started) = (JobStatus::Undefined, false);
                }
                assert!(may_become(at, *status), "{id}: {at} to {status} in {told:?}");
                started |= *status == JobStatus::Running;
                if *status == JobStatus::Concluded {
                    assert!(ends <= 1 && (started || ends == 0), "{id}: {ends} ends in {told:?}");
                    ends = 0;
                } else {
                    assert_eq!(ends, 0, "{id}: an end before {status} in {told:?}");
                }
                at = *status;
            }
            let listed = self.f.jobs.get(id).map_or(JobStatus::Null, |job| job.status);
            let told_last = if at == JobStatus::Undefined { JobStatus::Null } else { at };
            assert_eq!(listed, told_last, "{id} in {told:?}");
        }
        self.check_works();
    }

    /// Work is held as long as its job is not concluded, and no longer.
    fn check_works(&self) {
        for (id, work) in &self.works {
            let status = self.f.jobs.get(id).map(|job| job.status);
            let lives = status.is_some_and(|status| status != JobStatus::Concluded);
            assert_eq!(Arc::strong_count(&work.0), 1 + usize::from(lives), "{id}: {status:?}");
            let asked = work.asked();
            let settled = asked.iter().filter(|what| ["commit", "abort"].contains(what));
            assert!(settled.count() <= 1, "{id}: {asked:?}");
        }
    }

    /// All work does what is asked of it until nothing is left.
    fn drain(&mut self) {
        for work in self.works.values() {
            work.0.lock().unwrap().stubborn = false;
        }
        // In each round a job is started, its work ends, or it settles.
        for _ in 0..=3 * IDS.len() {
            for id in IDS {
                let _ = self.f.jobs.abandon(id);
                let _ = self.f.jobs.finish(id, Outcome::Cancelled);
                let _ = self.f.jobs.settled(id, Ok(()));
            }
            if self.f.jobs.close() == 0 {
                break;
            }
        }
        assert_eq!(self.f.jobs.query(), []);
        assert!(self.f.jobs.groups.is_empty(), "a group is left");
        assert_eq!(*self.ended.lock().unwrap(), self.waited, "who waited was not called once");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn no_order_of_verbs_and_reports_leaves_the_table_or_a_job_behind(
        acts in prop::collection::vec((prop::sample::select(IDS.to_vec()), act()), 0..80),
    ) {
        let mut model = Model::new();
        for (id, act) in acts {
            let before = model.f.told.lock().unwrap().len();
            let refused = model.act(id, &act);
            let after = model.f.told.lock().unwrap().len();
            prop_assert!(!refused || before == after, "{act:?} of '{id}': a refusal told an event");
            model.check();
        }
        model.drain();
        model.check();
    }
}
