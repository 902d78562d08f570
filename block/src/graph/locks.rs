//! From uses of nodes to the image locks of their files.
//!
//! A change of the graph is checked, then locks are widened to what it needs (so that another
//! process's use is found before anything is touched), then the change is made, then locks are
//! reduced to what is left. At no time is less locked than what is done.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::permissions::{self, Edge, Facts, Uses};
use crate::Result;
use crate::node::Node;
use crate::perm::Permissions;

/// Checks the uses of all nodes.
pub(super) fn check(edges: &[Edge], nodes: &[Arc<Node>]) -> Result<Uses> {
    let all: BTreeMap<_, _> = nodes.iter().map(|n| (n.name().to_owned(), facts(n))).collect();
    permissions::check(edges, &all)
}

pub(super) fn facts(node: &Node) -> Facts {
    let writable = !node.read_only();
    let force_share = node.details().flags.force_share;
    Facts { writable, was_writable: writable, force_share, inactive: node.is_inactive() }
}

/// Takes the locks of the uses besides those that are held.
pub(super) fn widen(nodes: &[Arc<Node>], uses: &Uses) -> Result<()> {
    nodes.iter().try_for_each(|node| widen_one(node, of(node, uses)))
}

/// As [`widen`], of one node.
pub(super) fn widen_one(node: &Node, uses: Permissions) -> Result<()> {
    match &node.details().host {
        Some(storage) => storage.widen_locks(uses),
        None => Ok(()),
    }
}

/// Gives up the locks that are not of the uses.
pub(super) fn reduce(nodes: &[Arc<Node>], uses: &Uses) {
    for node in nodes {
        if let Some(storage) = node.details().host.as_ref() {
            storage.reduce_locks(of(node, uses));
        }
    }
}

/// What is done with a node, as other processes are to see it.
pub(super) fn of(node: &Node, uses: &Uses) -> Permissions {
    uses.get(node.name()).copied().unwrap_or(Permissions::NONE)
}
