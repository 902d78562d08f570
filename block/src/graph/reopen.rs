//! blockdev-reopen: other options for nodes that are in use, for all of a list or for none.
//!
//! The image of a node is never changed: a new one is opened beside it and takes its place. Order:
//!
//! 1. plan: which nodes get which options, what is below them; nothing is touched.
//! 2. the uses of all nodes after the change are checked against each other.
//! 3. the gates of the planned nodes and of all nodes above them are closed from the top down: no
//!    request is under way. Above them too, because who has several requests of an overlay in flight
//!    must not come to wait at the gate of its backing file: it would wait for itself.
//! 4. writable images are flushed, so that what is opened beside them sees all of it.
//! 5. file locks are widened to what both states need: another process's use is found here.
//! 6. new images are opened, from the bottom up, on new descriptors where the mode of a file
//!    changes; these take over the locks while the old ones still hold them.
//! 7. the new images take the places of the old, locks are reduced to what is left, gates open.
//!
//! Up to 6 every failure leaves all nodes as they were; 7 cannot fail.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};

use serde_json::Value;

use super::activity::has_image;
use super::build::{self, Built, Flags};
use super::locks;
use super::open::not_found;
use super::options::{Backing, Driver, ImageOptions, NodeOptions, NodeRef, Source};
use super::permissions::{self, Edge, Facts, Parent, Role, Uses, parents_first, reaches};
use super::{Graph, State};
use crate::node::{Closed, Details, Node};
use crate::qcow2::Probe;
use crate::storage::{FileStorage, Storage};
use crate::{Error, Result};

/// Most levels of children that inherit options from one another.
const MAX_DEPTH: usize = 200;

/// What a node is to become.
pub(super) struct Plan {
    node: Arc<Node>,
    options: NodeOptions,
    flags: Flags,
    file: Option<Arc<Node>>,
    data_file: Option<Arc<Node>>,
    backing: Option<Arc<Node>>,
}

impl Graph {
    /// Gives nodes other options, as QMP's blockdev-reopen: what an entry does not say goes back to
    /// its default.
    ///
    /// # Errors
    /// With QEMU's text where QEMU has one; all nodes are as they were then.
    pub fn reopen(&self, list: &[Value]) -> Result<()> {
        let parse = |(index, options): (usize, &Value)| {
            NodeOptions::parse_in(options, &format!("options[{index}]"), Source::Json)
        };
        let list = list.iter().enumerate().map(parse).collect::<Result<Vec<_>>>()?;
        let state = self.state();
        let mut planner = Planner { state: &state, plans: BTreeMap::new() };
        for options in &list {
            planner.root(options)?;
        }
        let plans = planner.finish()?;
        for name in plans.keys() {
            state.check_unclaimed(name)?;
        }
        carry_out(state, &plans)
    }

    /// Has a node that is in use take writes or refuse them from now on, and what was opened with it
    /// to keep its bytes in; all else stays as it is.
    ///
    /// # Errors
    /// Somebody writes to it, it cannot be written, or another process uses it; it is as it was then.
    pub fn set_read_only(&self, name: &str, read_only: bool) -> Result<()> {
        let state = self.state();
        let node = state.get(name).cloned().ok_or_else(|| not_found(name))?;
        if node.read_only() == read_only {
            return Ok(());
        }
        let mut planner = Planner { state: &state, plans: BTreeMap::new() };
        planner.access(&node, read_only)?;
        let plans = planner.finish()?;
        carry_out(state, &plans)
    }
}

/// Steps 2 to 7.
pub(super) fn carry_out(
    mut state: MutexGuard<'_, State>,
    plans: &BTreeMap<String, Plan>,
) -> Result<()> {
    let edges = new_edges(&state, plans)?;
    let uses = permissions::check(&edges, &facts(&state, plans))?;
    let (swaps, above) = match prepare(&state, plans, &edges, &uses) {
        Ok(prepared) => prepared,
        Err(error) => {
            state.put_locks_back();
            return Err(error);
        }
    };
    for Swap { node, closed, built } in swaps {
        // Before the old image goes: it must not store once more what the new one keeps now.
        built.details.bitmaps.adopt(&node.bitmaps());
        // One may have been enabled while the image was read-only: what is stored of it, which
        // says that it follows no writes, goes stale with the next. A failure refuses writes.
        if let Some(image) = built.details.qcow2.as_ref().filter(|image| !image.is_read_only())
            && let Err(error) = image.resume_bitmaps()
        {
            tracing::error!(node = node.name(), "bitmaps cannot be marked: {error}");
        }
        state.damage.watch(node.name(), &built.details);
        node.replace(&closed, built.format, built.details);
        // A raw node may have become another part of its file.
        node.bitmaps().resize(node.size());
    }
    drop(above);
    state.edges = edges;
    // A backing file that was opened with its overlay goes when that has another.
    let orphans = state.forget_orphans();
    locks::reduce(&state.nodes, &uses);
    drop(state);
    drop(orphans);
    Ok(())
}

fn cannot_change<T>(option: &str) -> Result<T> {
    Err(Error::Invalid(format!("Cannot change the option '{option}'")))
}

pub(super) struct Planner<'a> {
    state: &'a State,
    plans: BTreeMap<String, Plan>,
}

impl<'a> Planner<'a> {
    /// Plans for nodes to become inactive, or active, and nothing else.
    pub(super) fn of_activity(
        state: &'a State,
        nodes: &[Arc<Node>],
        inactive: bool,
    ) -> Result<BTreeMap<String, Plan>> {
        let mut planner = Self { state, plans: BTreeMap::new() };
        for node in nodes.iter().filter(|node| has_image(node)) {
            let details = node.details();
            let flags = Flags { inactive, ..details.flags };
            planner.options(node, &details, flags.read_only, flags)?;
        }
        planner.finish()
    }

    fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.state.get(name).cloned()
    }

    fn finish(mut self) -> Result<BTreeMap<String, Plan>> {
        self.add_formats_of_files()?;
        Ok(self.plans)
    }

    /// The options that a node has, but for `read-only`.
    fn access(&mut self, node: &Arc<Node>, read_only: bool) -> Result<()> {
        let details = node.details();
        self.options(node, &details, read_only, details.flags)
    }

    fn options(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        read_only: bool,
        flags: Flags,
    ) -> Result<()> {
        let Some(mut options) = details.options.clone() else {
            return Err(Error::NotSupported(format!("Node '{}' cannot be reopened", node.name())));
        };
        options.read_only = Some(read_only);
        if let Driver::Qcow2 { backing, .. } = &mut options.driver {
            // Whatever is below it now.
            *backing = Backing::FromImage;
        }
        self.plan_unchecked(node, options, flags, 0)
    }

    /// An entry of the list.
    fn root(&mut self, options: &NodeOptions) -> Result<()> {
        let Some(name) = &options.node_name else {
            return Err(Error::Invalid("node-name not specified".to_owned()));
        };
        let Some(node) = self.find(name) else {
            return Err(Error::Invalid(format!("Failed to find node with node-name='{name}'")));
        };
        self.plan(&node, options.clone(), Flags::default(), 0)
    }

    fn plan(
        &mut self,
        node: &Arc<Node>,
        options: NodeOptions,
        inherited: Flags,
        depth: usize,
    ) -> Result<()> {
        let details = node.details();
        let names_backing = match &options.driver {
            Driver::Qcow2 { backing, .. } => *backing != Backing::FromImage,
            _ => false,
        };
        let has_backing = details.backing.is_some() || details.full_backing.is_some();
        // One that was opened with the node above it, and is reopened with it, keeps what it has.
        if has_backing && !names_backing && !details.implicit {
            return Err(Error::Invalid(format!("backing is missing for '{}'", node.name())));
        }
        self.plan_unchecked(node, options, inherited, depth)
    }

    /// As [`Planner::plan`]; without a word of what is below, it stays there.
    fn plan_unchecked(
        &mut self,
        node: &Arc<Node>,
        options: NodeOptions,
        inherited: Flags,
        depth: usize,
    ) -> Result<()> {
        let details = node.details();
        let Some(old) = details.options.as_ref().filter(|_| depth < MAX_DEPTH) else {
            return Err(Error::NotSupported(format!("Node '{}' cannot be reopened", node.name())));
        };
        if options.driver.name() != old.driver.name() {
            return cannot_change("driver");
        }
        if options.node_name.as_deref().is_some_and(|name| name != node.name()) {
            return cannot_change("node-name");
        }
        let flags = inherited.with(&options)?;
        if flags.force_share != details.flags.force_share {
            return cannot_change("force-share");
        }
        let (mut file, mut data_file, mut backing) = (None, None, None);
        match (&options.driver, &old.driver) {
            (
                Driver::File { filename, locking, .. },
                Driver::File { filename: old_filename, locking: old_locking, .. },
            ) => {
                if filename != old_filename {
                    return cannot_change("filename");
                }
                if locking != old_locking {
                    return cannot_change("locking");
                }
            }
            (Driver::Raw { file: wanted, .. }, _) => {
                file = Some(self.file(node, &details, wanted, flags, depth)?);
            }
            (Driver::Compress { .. }, _) => {
                return Err(Error::NotSupported(format!(
                    "Node '{}' cannot be reopened: it is a compress filter",
                    node.name()
                )));
            }
            (Driver::Qcow2 { file: wanted, backing: below, image }, _) => {
                data_file = self.data_file(node, &details, image, flags, depth)?;
                backing = self.backing(node, &details, below, flags, depth)?;
                file = Some(self.file(node, &details, wanted, flags, depth)?);
            }
            _ => return cannot_change("driver"),
        }
        let plan = Plan { node: node.clone(), options, flags, file, data_file, backing };
        self.plans.insert(node.name().to_owned(), plan);
        Ok(())
    }

    fn file(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        wanted: &NodeRef,
        flags: Flags,
        depth: usize,
    ) -> Result<Arc<Node>> {
        let child = self.child(node, details.file.as_ref(), "file", wanted, flags, depth)?;
        build::storage_of(&child)?;
        Ok(child)
    }

    /// Without a word the one there is stays, and follows the image where it was opened with it.
    fn data_file(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        image: &ImageOptions,
        flags: Flags,
        depth: usize,
    ) -> Result<Option<Arc<Node>>> {
        let current = details.data_file.as_ref();
        let there = current.map(|node| NodeRef::Name(node.name().to_owned()));
        let Some(wanted) = image.data_file.clone().or(there) else { return Ok(None) };
        let child = self.child(node, current, "data-file", &wanted, flags, depth)?;
        build::storage_of(&child)?;
        Ok(Some(child))
    }

    fn backing(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        wanted: &Backing,
        flags: Flags,
        depth: usize,
    ) -> Result<Option<Arc<Node>>> {
        let current = details.backing.as_ref();
        match wanted {
            Backing::None => Ok(None),
            Backing::Node(wanted) => {
                let flags = flags.of_backing();
                self.child(node, current, "backing", wanted, flags, depth).map(Some)
            }
            Backing::FromImage => Ok(current.cloned()),
        }
    }

    /// A child: another node, or the one there is. That one gets options only if it was opened as a
    /// part of `node`: nodes with a life of their own are reopened by their own names.
    fn child(
        &mut self,
        node: &Arc<Node>,
        current: Option<&Arc<Node>>,
        label: &str,
        wanted: &NodeRef,
        flags: Flags,
        depth: usize,
    ) -> Result<Arc<Node>> {
        let inherits =
            |child: &Arc<Node>| child.details().inherits_from.as_deref() == Some(node.name());
        match wanted {
            NodeRef::Name(name) => {
                let missing =
                    || Error::Invalid(format!("Cannot find device='' nor node-name='{name}'"));
                let child = self.find(name).ok_or_else(missing)?;
                let same = current.is_some_and(|current| Arc::ptr_eq(current, &child));
                if same && inherits(&child) && !self.plans.contains_key(child.name()) {
                    let options = child.details().options.clone();
                    if let Some(options) = options {
                        self.plan(&child, options, flags, depth + 1)?;
                    }
                }
                Ok(child)
            }
            NodeRef::Inline(options) => match current.filter(|child| inherits(child)) {
                Some(child) => {
                    self.plan(child, (**options).clone(), flags, depth + 1)?;
                    Ok(child.clone())
                }
                None => cannot_change(&format!("{label}.driver")),
            },
        }
    }

    /// A format holds the storage of its file: where the file's node gets another, the format is
    /// opened again too, with the options it has.
    fn add_formats_of_files(&mut self) -> Result<()> {
        for node in &self.state.nodes {
            let details = node.details();
            let mut files = details.file.iter().chain(&details.data_file);
            if self.plans.contains_key(node.name())
                || matches!(
                    details.options,
                    Some(NodeOptions { driver: Driver::Compress { .. }, .. })
                )
                || !files.any(|file| self.plans.contains_key(file.name()))
            {
                continue;
            }
            let Some(options) = details.options.clone() else { continue };
            let plan = Plan {
                node: node.clone(),
                options,
                flags: details.flags,
                file: details.file.clone(),
                data_file: details.data_file.clone(),
                backing: details.backing.clone(),
            };
            self.plans.insert(node.name().to_owned(), plan);
        }
        Ok(())
    }
}

/// The uses after the change; a child that is not changed keeps its place.
fn new_edges(state: &State, plans: &BTreeMap<String, Plan>) -> Result<Vec<Edge>> {
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

fn facts(state: &State, plans: &BTreeMap<String, Plan>) -> BTreeMap<String, Facts> {
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
struct Swap {
    node: Arc<Node>,
    closed: Closed,
    built: Built,
}

/// Steps 3 to 6. Gives the closed gates of the nodes above as well.
fn prepare(
    state: &State,
    plans: &BTreeMap<String, Plan>,
    edges: &[Edge],
    uses: &Uses,
) -> Result<(Vec<Swap>, Vec<Closed>)> {
    let all = facts(state, plans);
    let (mut gates, mut above) = (BTreeMap::new(), Vec::new());
    // Requests on their way down follow the edges there are now.
    for name in parents_first(&state.edges, &all) {
        if let Some(plan) = plans.get(name) {
            gates.insert(name, plan.node.close_gate());
        } else if plans.keys().any(|below| reaches(&state.edges, name, below))
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
    // Of qcow2, as they were stored and read again until step 7.
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
