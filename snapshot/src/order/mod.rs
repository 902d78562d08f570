//! One change to the snapshots of several nodes: on all of them, or on none.
//!
//! ```text
//!  prepare n0, n1, .. ──> publish n0, n1, .. ──> finish n0, n1, ..
//!          │                      │
//!          └── any failure ───────┴──> rollback .., n1, n0 (every node, also those not reached)
//! ```
//!
//! Where a guest is waiting ([`show_all`], [`settle_all`]): `show n0, n1, ..` in memory, then `publish, finish` on
//! all nodes at once, beside the guest.
//!
//! The caller puts the node that makes the change count last (the VM-state node at a save), so that
//! a crash between two publishes never shows a checkpoint that lacks a disk.

use std::sync::{Mutex, PoisonError};
use std::thread;

use block::{Progress, SnapshotChange, Together};

/// A change on one node.
pub struct NodeChange<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The change, begun but not prepared.
    pub change: Box<dyn SnapshotChange + 'a>,
}

/// The step that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Starting the change.
    Begin,
    /// [`SnapshotChange::prepare`].
    Prepare,
    /// [`SnapshotChange::publish`].
    Publish,
}

/// A change that could not be made. Every node is as it was, except those in `not_undone`.
#[derive(Debug, thiserror::Error)]
#[error("{source}{}", not_undone_text(.not_undone))]
pub struct ChangeError {
    /// The node that failed.
    pub node: String,
    /// Where it failed.
    pub step: Step,
    /// Why.
    pub source: Box<block::Error>,
    /// Nodes whose change could not be undone, with why.
    pub not_undone: Vec<(String, block::Error)>,
}

impl ChangeError {
    /// A change that could not be begun on `node`; those begun on other nodes are undone.
    pub(crate) fn at_begin(node: &str, source: block::Error, begun: &mut [NodeChange<'_>]) -> Self {
        Self {
            node: node.to_owned(),
            step: Step::Begin,
            source: Box::new(source),
            not_undone: rollback(begun),
        }
    }

    /// Whether the change ended because it was no longer wanted.
    pub fn is_cancelled(&self) -> bool {
        matches!(*self.source, block::Error::Cancelled) && self.not_undone.is_empty()
    }
}

/// Makes the changes in the order given. `progress` can cancel them until the first is published;
/// from then on the change goes through, or is rolled back for an error.
pub(crate) fn all_or_none(
    changes: &mut [NodeChange<'_>],
    progress: Option<&Progress>,
) -> Result<(), ChangeError> {
    prepare_all(changes, progress)?;
    publish_all(changes, progress)
}

/// Does all that can fail of the changes, or undoes them. They are to be published or rolled back.
pub fn prepare_all(
    changes: &mut [NodeChange<'_>],
    progress: Option<&Progress>,
) -> Result<(), ChangeError> {
    for at in 0..changes.len() {
        let result = check(progress).and_then(|()| changes[at].change.prepare());
        result.map_err(|error| undone(changes, at, Step::Prepare, error))?;
    }
    Ok(())
}

/// Makes prepared changes visible in memory, or undoes all of them. They are to be settled.
pub(crate) fn show_all(changes: &mut [NodeChange<'_>]) -> Result<(), ChangeError> {
    let together = Together::new(changes.len());
    for at in 0..changes.len() {
        let result = changes[at].change.show(&together);
        result.map_err(|error| undone(changes, at, Step::Publish, error))?;
    }
    Ok(())
}

/// Makes shown changes durable, all nodes at once, and finishes them, on each node whatever happens on the others:
/// a guest has seen them. Gives the first error; what it leaves undone the next flush of that node does.
pub(crate) fn settle_all(changes: &mut [NodeChange<'_>]) -> Result<(), ChangeError> {
    settle_by(changes, changes.len().saturating_sub(1))
}

/// As [`settle_all`], by this many threads at most besides the calling one. Where the host has none to
/// spare, those there are do the work: nobody waits for a change that another node has yet to make.
fn settle_by(changes: &mut [NodeChange<'_>], helpers: usize) -> Result<(), ChangeError> {
    let waiting = Mutex::new(changes.iter_mut().enumerate());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let failures = Mutex::new(Vec::new());
    let worker = || {
        while let Some((at, one)) = next() {
            if let Err(error) = settle(one) {
                failures.lock().unwrap_or_else(PoisonError::into_inner).push((at, error));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..helpers {
            let helper = thread::Builder::new().name("settle".to_owned());
            if helper.spawn_scoped(scope, worker).is_err() {
                break;
            }
        }
        worker();
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    let first = failures.into_iter().min_by_key(|(at, _)| *at);
    first.map_or(Ok(()), |(_, error)| Err(error))
}

fn settle(one: &mut NodeChange<'_>) -> Result<(), ChangeError> {
    one.change.publish().map_err(|source| failed(one.node, source))?;
    finish(std::slice::from_mut(one));
    Ok(())
}

/// A change that stays, and is not durable.
fn failed(node: &str, source: block::Error) -> ChangeError {
    let (node, source) = (node.to_owned(), Box::new(source));
    ChangeError { node, step: Step::Publish, source, not_undone: Vec::new() }
}

/// Publishes and finishes prepared changes, or undoes all of them.
pub(crate) fn publish_all(
    changes: &mut [NodeChange<'_>],
    progress: Option<&Progress>,
) -> Result<(), ChangeError> {
    if changes.is_empty() {
        return Ok(());
    }
    check(progress).map_err(|error| undone(changes, 0, Step::Publish, error))?;
    for at in 0..changes.len() {
        let result = changes[at].change.publish();
        result.map_err(|error| undone(changes, at, Step::Publish, error))?;
    }
    finish(changes);
    Ok(())
}

fn check(progress: Option<&Progress>) -> block::Result<()> {
    progress.map_or(Ok(()), Progress::check)
}

/// Rolls everything back because of what happened on the node at `at`.
fn undone(
    changes: &mut [NodeChange<'_>],
    at: usize,
    step: Step,
    source: block::Error,
) -> ChangeError {
    ChangeError {
        node: changes[at].node.to_owned(),
        step,
        source: Box::new(source),
        not_undone: rollback(changes),
    }
}

/// Undoes changes, last first; returns the nodes on which that failed. A failure does not keep the
/// others from being undone.
pub fn rollback(changes: &mut [NodeChange<'_>]) -> Vec<(String, block::Error)> {
    let mut failed = Vec::new();
    for NodeChange { node, change } in changes.iter_mut().rev() {
        if let Err(error) = change.rollback() {
            tracing::error!(node, %error, "a snapshot change could not be rolled back");
            failed.push(((*node).to_owned(), error));
        }
    }
    failed
}

/// The change is visible on every node: what fails now leaks clusters and nothing else.
fn finish(changes: &mut [NodeChange<'_>]) {
    for NodeChange { node, change } in changes {
        if let Err(error) = change.finish() {
            tracing::warn!(node, %error, "clusters are leaked; 'qemu-img check -r leaks' reclaims them");
        }
    }
}

fn not_undone_text(nodes: &[(String, block::Error)]) -> String {
    let text = |(node, error): &(String, block::Error)| {
        format!("; '{node}' could not be put back as it was: {error}")
    };
    nodes.iter().map(text).collect()
}

#[cfg(test)]
mod tests;
