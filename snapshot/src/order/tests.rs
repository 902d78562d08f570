//! The order of steps, and a failure at each of them.

use std::sync::{Arc, Mutex};

use super::*;

type Log = Arc<Mutex<Vec<String>>>;

struct Fake {
    name: &'static str,
    fail: &'static [&'static str],
    cancel_at: Option<(&'static str, Arc<Progress>)>,
    log: Log,
}

impl Fake {
    fn step(&self, step: &str) -> block::Result<()> {
        self.log.lock().unwrap().push(format!("{} {step}", self.name));
        if let Some((at, progress)) = &self.cancel_at
            && *at == step
        {
            progress.cancel();
        }
        if self.fail.contains(&step) {
            return Err(block::Error::NotSupported(format!("no {step}")));
        }
        Ok(())
    }
}

impl SnapshotChange for Fake {
    fn prepare(&mut self) -> block::Result<()> {
        self.step("prepare")
    }
    fn show(&mut self, together: &Arc<Together>) -> block::Result<()> {
        self.step("show")?;
        together.settled();
        Ok(())
    }
    fn publish(&mut self) -> block::Result<()> {
        self.step("publish")
    }
    fn finish(&mut self) -> block::Result<()> {
        self.step("finish")
    }
    fn rollback(&mut self) -> block::Result<()> {
        self.step("rollback")
    }
}

/// Runs the order over nodes a, b, c with the given failing steps; returns the result and the log.
fn run(fails: [&'static [&'static str]; 3]) -> (Result<(), ChangeError>, Vec<String>) {
    run_as(|changes| all_or_none(changes, None), fails)
}

fn run_as(
    order: impl Fn(&mut [NodeChange<'_>]) -> Result<(), ChangeError>,
    fails: [&'static [&'static str]; 3],
) -> (Result<(), ChangeError>, Vec<String>) {
    let log = Log::default();
    let mut changes: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .zip(fails)
        .map(|(name, fail)| NodeChange {
            node: name,
            change: Box::new(Fake { name, fail, cancel_at: None, log: log.clone() }),
        })
        .collect();
    let result = order(&mut changes);
    let log = log.lock().unwrap().clone();
    (result, log)
}

fn shown(changes: &mut [NodeChange<'_>]) -> Result<(), ChangeError> {
    prepare_all(changes, None)?;
    show_all(changes)?;
    settle_all(changes)
}

#[test]
fn shown_changes_are_published_and_finished_on_each_node_whatever_fails_on_others() {
    for at in 0..3 {
        let mut fails: [&[&str]; 3] = [&[]; 3];
        fails[at] = &["publish"];
        let (result, mut log) = run_as(shown, fails);
        let error = result.unwrap_err();
        assert_eq!((error.node.as_str(), error.step), (["a", "b", "c"][at], Step::Publish));
        assert_eq!(log[3..6], ["a show", "b show", "c show"]);
        log.drain(..6);
        for (n, node) in ["a", "b", "c"].into_iter().enumerate() {
            let steps: Vec<_> = log.iter().filter(|l| l.starts_with(node)).collect();
            assert_eq!(steps.len(), if n == at { 1 } else { 2 }, "{log:?}");
        }
        assert!(!log.iter().any(|l| l.ends_with("rollback")));
    }
    run_as(shown, [&[], &["finish"], &[]]).0.unwrap();
}

#[test]
fn changes_are_settled_whatever_threads_there_are_and_the_first_failure_is_told() {
    for helpers in [0, 1, 2, 100] {
        let settled = |changes: &mut [NodeChange<'_>]| settle_by(changes, helpers);
        let (result, log) = run_as(settled, [&[], &["publish"], &["publish"]]);
        assert_eq!(result.unwrap_err().node, "b");
        for step in ["a publish", "a finish", "b publish", "c publish"] {
            assert_eq!(log.iter().filter(|l| *l == step).count(), 1, "{helpers}: {log:?}");
        }
        assert_eq!(log.len(), 4, "{helpers}: {log:?}");
        run_as(settled, [&[]; 3]).0.unwrap();
    }
}

#[test]
fn failed_show_on_each_node_rolls_all_back_and_publishes_none() {
    for at in 0..3 {
        let mut fails: [&[&str]; 3] = [&[]; 3];
        fails[at] = &["show"];
        let (result, log) = run_as(shown, fails);
        assert_eq!(result.unwrap_err().node, ["a", "b", "c"][at]);
        assert!(!log.iter().any(|l| l.ends_with("publish") || l.ends_with("finish")));
        assert_eq!(log[log.len() - 3..], ROLLBACK);
    }
}

const ROLLBACK: [&str; 3] = ["c rollback", "b rollback", "a rollback"];

#[test]
fn success_prepares_all_then_publishes_in_order_then_finishes() {
    let (result, log) = run([&[], &[], &[]]);
    result.unwrap();
    assert_eq!(
        log,
        [
            "a prepare",
            "b prepare",
            "c prepare",
            "a publish",
            "b publish",
            "c publish",
            "a finish",
            "b finish",
            "c finish"
        ]
    );
}

#[test]
fn failed_prepare_on_each_node_rolls_all_back_and_publishes_none() {
    for at in 0..3 {
        let mut fails: [&[&str]; 3] = [&[]; 3];
        fails[at] = &["prepare"];
        let (result, log) = run(fails);
        let error = result.unwrap_err();
        assert_eq!((error.node.as_str(), error.step), (["a", "b", "c"][at], Step::Prepare));
        assert_eq!(error.to_string(), "no prepare");
        assert!(error.not_undone.is_empty());
        assert!(!log.iter().any(|l| l.ends_with("publish")));
        assert_eq!(log[log.len() - 3..], ROLLBACK);
    }
}

#[test]
fn failed_publish_on_each_node_rolls_all_back_and_finishes_none() {
    for at in 0..3 {
        let mut fails: [&[&str]; 3] = [&[]; 3];
        fails[at] = &["publish"];
        let (result, log) = run(fails);
        assert_eq!(result.unwrap_err().step, Step::Publish);
        assert_eq!(log.iter().filter(|l| l.ends_with("publish")).count(), at + 1);
        assert!(!log.iter().any(|l| l.ends_with("finish")));
        assert_eq!(log[log.len() - 3..], ROLLBACK);
    }
}

#[test]
fn failed_rollback_is_told_and_the_others_are_still_undone() {
    let (result, log) = run([&[], &["rollback"], &["publish"]]);
    let error = result.unwrap_err();
    assert_eq!(error.not_undone.len(), 1);
    assert_eq!(error.to_string(), "no publish; 'b' could not be put back as it was: no rollback");
    assert_eq!(log[log.len() - 3..], ROLLBACK);
}

#[test]
fn failed_finish_is_success_and_the_others_still_finish() {
    let (result, log) = run([&["finish"], &[], &[]]);
    result.unwrap();
    assert_eq!(log[log.len() - 3..], ["a finish", "b finish", "c finish"]);
}

#[test]
fn cancel_before_the_first_publish_rolls_back_and_after_it_does_not() {
    for (step, expect_ok) in [("prepare", false), ("publish", true)] {
        let (log, progress) = (Log::default(), Arc::new(Progress::default()));
        let mut changes: Vec<_> = ["a", "b"]
            .map(|name| NodeChange {
                node: name,
                change: Box::new(Fake {
                    name,
                    fail: &[],
                    cancel_at: (name == "a").then(|| (step, progress.clone())),
                    log: log.clone(),
                }),
            })
            .into_iter()
            .collect();
        let result = all_or_none(&mut changes, Some(&progress));
        assert_eq!(result.is_ok(), expect_ok, "cancelled in {step}");
        let log = log.lock().unwrap();
        if let Err(error) = result {
            assert!(error.is_cancelled());
            assert_eq!(*log, ["a prepare", "b rollback", "a rollback"]);
        } else {
            assert_eq!(log[log.len() - 2..], ["a finish", "b finish"]);
        }
    }
}
