//! Steps 3 to 6: holding the nodes still and opening what is to take the places of their images.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::build::{self, Built};
use super::super::options::Driver;
use super::super::permissions::{
    Edge, Facts, Parent, Role, Uses, parents_first, reaches, that_reach,
};
use super::super::{State, locks};
use super::cannot_change;
use super::plan::Plan;
use crate::node::{Closed, Details, Node};
use crate::qcow2::Probe;
use crate::storage::{FileStorage, Storage};
use crate::{Error, Result};

/// The uses after the change; a child that is not changed keeps its place.
pub(super) fn new_edges(state: &State, plans: &BTreeMap<String, Plan>) -> Result<Vec<Edge>> {
    let mut edges = state.edges.clone();
    for (name, plan) in plans {
        let parent = Parent::Node(name.clone());
        let file_role = match &plan.options.driver {
            Driver::Raw { window, .. } if window.is_whole() => Role::Filtered,
            Driver::Raw { .. } => Role::Part,
            _ => Role::Image,
        };
        let wanted = [
            ("file", file_role, &plan.file),
            ("data-file", Role::Data, &plan.data_file),
            ("backing", Role::Backing, &plan.backing),
        ];
        for (label, role, child) in wanted {
            let child = child.as_ref().map(|child| child.name().to_owned());
            let mut kept = false;
            edges.retain_mut(|edge| {
                if edge.parent != parent || edge.label != label {
                    return true;
                }
                kept = Some(&edge.child) == child.as_ref();
                edge.role = role;
                kept
            });
            let Some(child) = child.filter(|_| !kept) else { continue };
            if reaches(&edges, &child, name) {
                return Err(Error::Invalid(format!(
                    "Making '{child}' a {label} child of '{name}' would create a cycle"
                )));
            }
            edges.push(Edge { parent: parent.clone(), child, label, role });
        }
    }
    Ok(edges)
}

pub(super) fn facts(state: &State, plans: &BTreeMap<String, Plan>) -> BTreeMap<String, Facts> {
    let of = |node: &Arc<Node>| {
        let mut facts = locks::facts(node);
        if let Some(plan) = plans.get(node.name()) {
            facts.writable = !plan.flags.read_only;
            facts.inactive = plan.flags.inactive;
        }
        (node.name().to_owned(), facts)
    };
    state.nodes.iter().map(of).collect()
}

/// A node that holds still, and what is to take the place of its image.
pub(super) struct Swap {
    pub(super) node: Arc<Node>,
    pub(super) closed: Closed,
    pub(super) built: Built,
}

/// Steps 3 to 6. Gives the closed gates of the nodes above as well.
pub(super) fn prepare(
    state: &State,
    plans: &BTreeMap<String, Plan>,
    edges: &[Edge],
    uses: &Uses,
) -> Result<(Vec<Swap>, Vec<Closed>)> {
    let all = facts(state, plans);
    let (mut gates, mut above) = (BTreeMap::new(), Vec::new());
    let concerned = that_reach(&state.edges, plans.keys().map(String::as_str));
    // Requests on their way down follow the edges there are now.
    for name in parents_first(&state.edges, &all) {
        if let Some(plan) = plans.get(name) {
            gates.insert(name, plan.node.close_gate());
        } else if concerned.contains(name)
            && let Some(node) = state.get(name)
        {
            above.push(node.close_gate());
        }
    }
    for plan in plans.values() {
        if !plan.node.is_alone_with_format() {
            return Err(Error::Invalid(format!(
                "Node '{}' is busy: a job is working on it",
                plan.node.name()
            )));
        }
    }
    // From here on a failure has to set the stored bitmaps going again, before gates open.
    let swaps = open_all(state, plans, edges, uses, &mut gates);
    swaps.map(|swaps| (swaps, above)).inspect_err(|_| resume_bitmaps(plans))
}

/// Steps 4 to 6. The swaps come bottom-up; on an error the gates are still closed.
fn open_all<'a>(
    state: &State,
    plans: &'a BTreeMap<String, Plan>,
    edges: &[Edge],
    uses: &Uses,
    gates: &mut BTreeMap<&'a str, Closed>,
) -> Result<Vec<Swap>> {
    for plan in plans.values().filter(|plan| is_written(&plan.node)) {
        plan.node.format().flush()?;
        if let Some(image) = plan.node.qcow2() {
            image.store_bitmaps()?;
            // Counts that were deferred too: the image that takes its place reads them.
            image.settle()?;
        }
    }
    locks::widen(&state.nodes, uses)?;
    let all = facts(state, plans);
    let mut files = BTreeMap::new();
    let mut swaps = Vec::with_capacity(plans.len());
    for name in parents_first(edges, &all).into_iter().rev() {
        let Some(plan) = plans.get(name) else { continue };
        let built = build(plan, &mut files, uses)?;
        if let Some(closed) = gates.remove(name) {
            swaps.push(Swap { node: plan.node.clone(), closed, built });
        }
    }
    Ok(swaps)
}

fn is_written(node: &Node) -> bool {
    !node.read_only() && !node.is_inactive()
}

/// The images stay in use after all.
fn resume_bitmaps(plans: &BTreeMap<String, Plan>) {
    for plan in plans.values().filter(|plan| is_written(&plan.node)) {
        if let Some(Err(error)) = plan.node.qcow2().map(|image| image.resume_bitmaps()) {
            tracing::error!(node = plan.node.name(), "bitmaps cannot be marked: {error}");
        }
    }
}

/// Opens what a node is to become. `files` are those that were opened again.
fn build(
    plan: &Plan,
    files: &mut BTreeMap<String, Arc<FileStorage>>,
    uses: &Uses,
) -> Result<Built> {
    let old = plan.node.details();
    let storage_now = |files: &BTreeMap<String, Arc<FileStorage>>, file: &Arc<Node>| match files
        .get(file.name())
    {
        Some(storage) => Ok(storage.clone() as Arc<dyn Storage>),
        None => build::storage_of(file),
    };
    let built = match (&plan.options.driver, &plan.file) {
        (Driver::File { filename, locking, aio, host_device }, _) => {
            let Some(host) = &old.host else { return cannot_change("driver") };
            let options = build::file_options(plan.flags, (*locking, *aio));
            let storage = if *host.options() == options {
                host.clone()
            } else {
                Arc::new(host.reopen(options, locks::of(&plan.node, uses))?)
            };
            files.insert(plan.node.name().to_owned(), storage.clone());
            build::file_node(storage, filename, *host_device, plan.flags)?
        }
        (Driver::Raw { window, .. }, Some(file)) => {
            build::raw_node(file, storage_now(files, file)?, *window, plan.flags)?
        }
        (Driver::Qcow2 { image, .. }, Some(file)) => {
            let storage = storage_now(files, file)?;
            let probe = Probe::new(storage.clone())?;
            let data_file = match &plan.data_file {
                Some(node) => Some((node.clone(), storage_now(files, node)?)),
                None => None,
            };
            let (backing, options) = (plan.backing.clone(), image.to_options());
            build::qcow2_node(probe, file, storage, data_file, backing, plan.flags, options)?
        }
        _ => return cannot_change("driver"),
    };
    // A qcow2 image has read back what was stored, until step 7; others keep theirs in memory.
    let bitmaps = match &built.details.qcow2 {
        Some(_) => built.details.bitmaps.clone(),
        None => old.bitmaps.clone(),
    };
    let details = Details {
        bitmaps,
        options: Some(plan.options.clone()),
        inherits_from: old.inherits_from.clone(),
        implicit: old.implicit,
        ..built.details
    };
    Ok(Built { details, ..built })
}
