//! Several actions at one moment: all of them, or none. Pure: what an action does is not known here.
//!
//! ```text
//!            nothing visible         one moment              durable       visible on disk
//!   each:    prepare ──────> hold ──> point ──> (release) ──> secure ────> publish ──> commit
//!               │                       │                        │            │
//!               └───────────────────────┴────────────────────────┴────────────┴──> abort
//! ```
//!
//! - `prepare` and `point` go in the order of the actions, so that a later action finds what an earlier
//!   one has done. Actions that have long preparations have them before requests are held back; where no
//!   action has, each is prepared and done before the next.
//! - The reply is the failure of the first action that cannot be done, as in QEMU. So where one cannot be
//!   prepared, those before it are tried at a moment of their own, which is undone with them.
//! - Requests are held back until all is committed; where every action allows it, only for `point`.
//! - `abort` and `commit` go from the last action to the first, as in QEMU.

use crate::Error;

/// One action. Steps that are not overridden do nothing.
pub trait Action {
    /// Whether its preparation takes long, and requests go on meanwhile.
    fn prepares_long(&self) -> bool {
        false
    }

    /// Whether requests may go on before it is committed: it can be undone exactly all the same.
    fn lets_go_early(&self) -> bool {
        false
    }

    /// Checks, and does what is not visible.
    ///
    /// # Errors
    /// It cannot be done; it has undone what it did.
    fn prepare(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// What makes the moment, with requests held back. Short.
    ///
    /// # Errors
    /// It cannot be done; it is to be aborted.
    fn point(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Does all that can fail.
    ///
    /// # Errors
    /// It cannot be done; it is to be aborted.
    fn secure(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Makes it count.
    ///
    /// # Errors
    /// It cannot be done; it is to be aborted.
    fn publish(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// All actions count.
    fn commit(&mut self) {}

    /// All actions count, and requests go on.
    fn released(&mut self) {}

    /// After a successful `prepare`: all is as it was.
    fn abort(&mut self) {}
}

/// Carries out the actions. `hold` holds back requests until what it returns is dropped.
///
/// # Errors
/// That of the first action that failed; no action has had an effect.
pub fn run<A: Action + ?Sized, H>(
    actions: &mut [Box<A>],
    hold: impl Fn() -> Result<H, Error>,
) -> Result<(), Error> {
    let long = actions.iter().any(|action| action.prepares_long());
    if long {
        prepare_all(actions, &hold)?;
    }
    let held = match hold() {
        Ok(held) => held,
        Err(error) => {
            abort(if long { actions } else { &mut [] });
            return Err(error);
        }
    };
    if long {
        each(actions, |action| action.point())?;
    } else {
        prepare_and_point(actions)?;
    }
    let early = actions.iter().all(|action| action.lets_go_early());
    let held = (!early).then_some(held);
    each(actions, |action| action.secure())?;
    each(actions, |action| action.publish())?;
    for action in actions.iter_mut().rev() {
        action.commit();
    }
    drop(held);
    for action in actions.iter_mut().rev() {
        action.released();
    }
    Ok(())
}

/// Prepares all; where one fails, those before it have their point tried and are aborted.
///
/// # Errors
/// That of the first that cannot be done.
pub fn prepare_all<A: Action + ?Sized, H>(
    actions: &mut [Box<A>],
    hold: impl Fn() -> Result<H, Error>,
) -> Result<(), Error> {
    for at in 0..actions.len() {
        if let Err(error) = actions[at].prepare() {
            let before = &mut actions[..at];
            if let Ok(_held) = hold() {
                each(before, |action| action.point())?;
                abort(before);
            } else {
                abort(before);
            }
            return Err(error);
        }
    }
    Ok(())
}

fn prepare_and_point<A: Action + ?Sized>(actions: &mut [Box<A>]) -> Result<(), Error> {
    for at in 0..actions.len() {
        if let Err(error) = actions[at].prepare() {
            abort(&mut actions[..at]);
            return Err(error);
        }
        if let Err(error) = actions[at].point() {
            abort(&mut actions[..=at]);
            return Err(error);
        }
    }
    Ok(())
}

/// Has each do a step; where one fails, all are aborted.
///
/// # Errors
/// That of the first that failed.
pub fn each<A: Action + ?Sized>(
    actions: &mut [Box<A>],
    step: impl Fn(&mut A) -> Result<(), Error>,
) -> Result<(), Error> {
    for at in 0..actions.len() {
        if let Err(error) = step(&mut actions[at]) {
            abort(actions);
            return Err(error);
        }
    }
    Ok(())
}

/// Undoes prepared actions, the last first.
pub fn abort<A: Action + ?Sized>(actions: &mut [Box<A>]) {
    for action in actions.iter_mut().rev() {
        action.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;

    /// What is done, in order; and the world that actions change.
    #[derive(Default)]
    struct World {
        log: Vec<String>,
        values: BTreeMap<u8, i64>,
        held: bool,
    }

    #[derive(Debug, Clone)]
    struct Plan {
        key: u8,
        add: i64,
        long: bool,
        early: bool,
        fails: Option<&'static str>,
    }

    /// Adds to a value, at its point; the old one is put back by an abort.
    struct Test {
        id: usize,
        plan: Plan,
        world: Rc<RefCell<World>>,
        before: Option<Option<i64>>,
    }

    impl Test {
        fn step(&self, step: &'static str) -> Result<(), Error> {
            let mut world = self.world.borrow_mut();
            let held = if world.held { "*" } else { "" };
            world.log.push(format!("{step}{}{held}", self.id));
            match self.plan.fails {
                Some(fails) if fails == step => Err(Error::generic(format!("{step}{}", self.id))),
                _ => Ok(()),
            }
        }
    }

    impl Action for Test {
        fn prepares_long(&self) -> bool {
            self.plan.long
        }

        fn lets_go_early(&self) -> bool {
            self.plan.early
        }

        fn prepare(&mut self) -> Result<(), Error> {
            self.step("prepare")
        }

        fn point(&mut self) -> Result<(), Error> {
            self.step("point")?;
            assert!(self.world.borrow().held, "the moment is one");
            let mut world = self.world.borrow_mut();
            self.before = Some(world.values.get(&self.plan.key).copied());
            *world.values.entry(self.plan.key).or_default() += self.plan.add;
            Ok(())
        }

        fn secure(&mut self) -> Result<(), Error> {
            self.step("secure")
        }

        fn publish(&mut self) -> Result<(), Error> {
            self.step("publish")
        }

        fn commit(&mut self) {
            self.step("commit").unwrap();
        }

        fn abort(&mut self) {
            self.step("abort").unwrap();
            let mut world = self.world.borrow_mut();
            match self.before.take() {
                Some(Some(value)) => drop(world.values.insert(self.plan.key, value)),
                Some(None) => drop(world.values.remove(&self.plan.key)),
                None => {}
            }
        }
    }

    struct Held(Rc<RefCell<World>>);

    impl Drop for Held {
        fn drop(&mut self) {
            self.0.borrow_mut().held = false;
            self.0.borrow_mut().log.push("release".to_owned());
        }
    }

    fn play(plans: &[Plan], values: BTreeMap<u8, i64>) -> (Result<(), Error>, Rc<RefCell<World>>) {
        let world = Rc::new(RefCell::new(World { values, ..World::default() }));
        let mut actions: Vec<Box<Test>> = plans
            .iter()
            .enumerate()
            .map(|(id, plan)| {
                let (plan, world) = (plan.clone(), world.clone());
                Box::new(Test { id, plan, world, before: None })
            })
            .collect();
        let held = world.clone();
        let result = run(&mut actions, || {
            held.borrow_mut().held = true;
            Ok(Held(held.clone()))
        });
        (result, world)
    }

    const PLAIN: Plan = Plan { key: 0, add: 1, long: false, early: false, fails: None };

    fn log(plans: &[Plan]) -> String {
        play(plans, BTreeMap::new()).1.borrow().log.join(" ")
    }

    #[test]
    fn short_actions_are_done_one_after_the_other_with_requests_held_back() {
        let all = "prepare0* point0* prepare1* point1* secure0* secure1* publish0* publish1* \
                   commit1* commit0* release";
        assert_eq!(log(&[PLAIN, PLAIN]), all);
    }

    #[test]
    fn long_preparations_come_before_requests_are_held_back() {
        let long = Plan { long: true, early: true, ..PLAIN };
        let all = "prepare0 prepare1 point0* point1* release secure0 secure1 publish0 publish1 \
                   commit1 commit0";
        assert_eq!(log(&[long.clone(), long.clone()]), all);
        // One that cannot let go holds back for all.
        let all = "prepare0 prepare1 point0* point1* secure0* secure1* publish0* publish1* \
                   commit1* commit0* release";
        assert_eq!(log(&[long, PLAIN]), all);
    }

    #[test]
    fn the_first_failure_is_the_reply_and_undoes_the_last_first() {
        for (step, expected) in [
            ("prepare", "prepare0* point0* prepare1* abort0* release"),
            ("point", "prepare0* point0* prepare1* point1* abort1* abort0* release"),
        ] {
            let bad = Plan { fails: Some(step), ..PLAIN };
            assert_eq!(log(&[PLAIN, bad.clone(), bad.clone()]), expected);
            let (result, _) = play(&[PLAIN, bad.clone(), bad], BTreeMap::new());
            assert_eq!(result.unwrap_err().desc, format!("{step}1"));
        }
        let bad = Plan { fails: Some("publish"), ..PLAIN };
        assert!(log(&[PLAIN, bad]).ends_with("publish0* publish1* abort1* abort0* release"));
    }

    #[test]
    fn what_comes_before_an_action_that_cannot_be_prepared_fails_first() {
        let long = Plan { long: true, ..PLAIN };
        let bad = Plan { fails: Some("prepare"), ..long.clone() };
        let all = "prepare0 prepare1 prepare2 point0* point1* abort1* abort0* release";
        assert_eq!(log(&[PLAIN, PLAIN, bad.clone()]), all);
        let short = Plan { fails: Some("point"), ..PLAIN };
        let all = "prepare0 prepare1 prepare2 point0* abort1* abort0* release";
        assert_eq!(log(&[short.clone(), long, bad.clone()]), all);
        let (result, _) = play(&[short, bad], BTreeMap::new());
        assert_eq!(result.unwrap_err().desc, "point0");
    }

    fn plan() -> impl Strategy<Value = Plan> {
        let steps = vec![None, None, None, None, Some("prepare"), Some("point"), Some("secure")];
        let fails = prop_oneof![prop::sample::select(steps), Just(Some("publish"))];
        (0..3_u8, -9..9_i64, any::<bool>(), any::<bool>(), fails)
            .prop_map(|(key, add, long, early, fails)| Plan { key, add, long, early, fails })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn all_actions_count_or_all_is_as_it_was(
            plans in prop::collection::vec(plan(), 0..7),
            values in prop::collection::btree_map(0..3_u8, -9..9_i64, 0..3),
        ) {
            let (result, world) = play(&plans, values.clone());
            let world = world.borrow();
            let first = |steps: &[&str]| {
                let fails = |(id, plan): (usize, &Plan)| {
                    plan.fails.filter(|step| steps.contains(step)).map(|step| format!("{step}{id}"))
                };
                plans.iter().enumerate().find_map(fails)
            };
            let failure = first(&["prepare", "point"]).or_else(|| first(&["secure"]));
            let failure = failure.or_else(|| first(&["publish"]));
            let mut expected = values;
            if failure.is_none() {
                for plan in &plans {
                    *expected.entry(plan.key).or_default() += plan.add;
                }
            }
            prop_assert_eq!(result.err().map(|error| error.desc), failure.clone());
            prop_assert_eq!(&world.values, &expected);
            prop_assert!(!world.held);
            for (id, plan) in plans.iter().enumerate() {
                let count = |step: &str| {
                    let name = format!("{step}{id}");
                    world.log.iter().filter(|entry| entry.trim_end_matches('*') == name).count()
                };
                let (prepared, ended) = (count("prepare"), count("commit") + count("abort"));
                let failed = plan.fails == Some("prepare");
                prop_assert!(ended <= 1 && prepared <= 1);
                prop_assert_eq!(ended, usize::from(prepared == 1 && !failed), "{} of {:?}", id, world.log);
            }
        }
    }
}
