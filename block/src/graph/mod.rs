//! The nodes of a machine, by name: blockdev-add, -del and -reopen, and who uses what.
//!
//! | file | what |
//! |---|---|
//! | `options`, `text` | QMP's options of a node, as JSON and as text |
//! | `open`, `build` | making nodes |
//! | `reopen` | changing nodes that are in use |
//! | `permissions` | QEMU's rules of who may use a node for what |
//! | `locks` | what of this other processes see |
//! | `attach`, `image_file` | devices, exports and jobs as users of nodes |
//! | `replace` | other nodes in the places of those in use |
//! | `chain` | chains of backing files, and what images name |
//! | `external` | external snapshots |
//! | `claim` | nodes that block jobs work with |
//! | `hold` | requests held back for several changes |
//! | `intercept` | jobs that act before a node changes |
//! | `info` | what QMP tells of a node |
//!
//! Lock order: the graph's state first, then the gates of nodes (top-down), then what formats lock. Who
//! holds requests back ([`Held`]) may take the state's lock: whoever has that lock and comes to a gate
//! waits for requests only, and these were waited for when they were held back.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::node::{Holding, Link, Node};
use crate::qcow2::Corruption;
use crate::{Error, Result};

mod activity;
mod attach;
mod build;
pub(crate) mod chain;
mod claim;
mod damage;
mod drive;
mod external;
mod hold;
mod image_file;
mod info;
mod intercept;
mod json;
mod locks;
mod open;
mod options;
mod permissions;
mod reopen;
mod replace;
pub mod text;

pub use attach::{Attachment, User};
pub use build::backing_path;
pub(crate) use build::{Flags, check_host_name, name_for_overlay};
pub use claim::Claim;
pub use drive::{Below, OpenTarget, TargetFile};
pub use external::{ExternalSnapshot, Overlay};
pub use hold::Held;
pub(crate) use image_file::ImageFile;
pub use info::{CacheInfo, ImageInfo, NodeInfo, snapshot_json};
pub(crate) use intercept::Intercepting;
pub(crate) use open::{no_such_node, not_found};
pub use options::DetectZeroes;
pub(crate) use options::NodeOptions;
pub use replace::Step;

use damage::Damage;
use open::Opener;
use options::Source;
pub use options::is_well_formed;
use permissions::{Edge, Parent, Role};

/// All nodes. Safe to use from several threads. Clones are one graph.
#[derive(Clone, Default)]
pub struct Graph {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// In order of their making.
    nodes: Vec<Arc<Node>>,
    /// All uses of nodes, in order of their making.
    edges: Vec<Edge>,
    /// Number of the next name that is made up.
    next: u32,
    /// Number of the next user.
    next_user: u64,
    /// Users that go on with the node that takes their node's place.
    followers: BTreeMap<u64, Link>,
    claims: BTreeMap<u64, claim::Claimed>,
    /// How many hold requests back, and the gates of nodes that were made since.
    holds: usize,
    made_while_held: Vec<Holding>,
    /// Jobs that changes of one node make write to another.
    feeds: Vec<intercept::Feed>,
    /// Who is told of damage in images.
    damage: Arc<Damage>,
    /// Nodes are opened inactive.
    inactive: bool,
}

impl State {
    fn get(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.iter().find(|node| node.name() == name)
    }

    /// The uses of a node, newest first.
    fn users_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Edge> {
        self.edges.iter().rev().filter(move |edge| edge.child == name)
    }

    /// Takes the locks that these uses ask for, and only these. Undone on an error.
    fn take_locks(&self, edges: &[Edge]) -> Result<()> {
        let uses = locks::check(edges, &self.nodes)?;
        if let Err(error) = locks::widen(&self.nodes, &uses) {
            self.put_locks_back();
            return Err(error);
        }
        locks::reduce(&self.nodes, &uses);
        Ok(())
    }

    /// After a failure, or after a use has ended: the locks are those of the uses that are left.
    fn put_locks_back(&self) {
        match locks::check(&self.edges, &self.nodes) {
            Ok(uses) => locks::reduce(&self.nodes, &uses),
            Err(error) => tracing::error!("more is locked than needed: {error}"),
        }
    }
}

impl Graph {
    /// A graph without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Opens a node and those below it as QMP's `BlockdevOptions` say.
    ///
    /// # Errors
    /// With QEMU's text where QEMU has one. Nothing is left open after an error.
    pub fn add(&self, options: &Value) -> Result<Arc<Node>> {
        self.open(&NodeOptions::parse(options, Source::Json)?)
    }

    /// As [`Graph::add`] for the command line: `key=value,...` or JSON.
    pub fn add_text(&self, options: &str) -> Result<Arc<Node>> {
        let (value, source) = text::parse(options)?;
        self.open(&NodeOptions::parse(&value, source)?)
    }

    fn open(&self, options: &NodeOptions) -> Result<Arc<Node>> {
        if options.node_name.is_none() {
            return Err(Error::Invalid(
                "'node-name' must be specified for the root node".to_owned(),
            ));
        }
        // Held while files are opened: names stay free and a node cannot go away meanwhile.
        let mut state = self.state();
        let opener =
            Opener::new(&state.nodes, state.edges.clone(), state.next, state.damage.clone())?;
        let inherited = Flags { inactive: state.inactive, ..Flags::default() };
        match opener.open_root(options, inherited) {
            Ok(opened) => {
                state.add_nodes(opened.made);
                state.edges = opened.edges;
                state.next = opened.next;
                Ok(opened.root)
            }
            Err(error) => {
                state.put_locks_back();
                Err(error)
            }
        }
    }

    /// Sets who is told, with the node's name, when an image is found damaged while it is in use. It
    /// is called with the image's lock held: it must not use nodes.
    pub fn on_corruption(&self, hook: impl Fn(&str, &Corruption) + Send + Sync + 'static) {
        self.state().damage.set(Box::new(hook));
    }

    /// Makes every image durable and stores its bitmaps, and counts that were deferred, overlays before
    /// what is below them: for the end of the program. Nobody may write any more.
    ///
    /// # Errors
    /// The first image that could not be written; the others are closed all the same.
    pub fn close_images(&self) -> Result<()> {
        let close = |node: &Arc<Node>| {
            node.flush()?;
            let Some(image) = node.qcow2() else { return Ok(()) };
            image.store_bitmaps()?;
            image.settle()
        };
        let writes = |node: &Arc<Node>| !node.read_only() && !node.is_inactive();
        let writable = self.list().into_iter().filter(writes);
        let results: Vec<_> = writable.map(|node| close(&node)).collect();
        results.into_iter().collect()
    }

    /// The node of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Node>> {
        self.state().get(name).cloned()
    }

    /// All nodes, newest first.
    pub fn list(&self) -> Vec<Arc<Node>> {
        self.state().nodes.iter().rev().cloned().collect()
    }

    /// Takes in a node that was made elsewhere: an image in memory, or of a kind of one's own.
    ///
    /// # Errors
    /// Its name is not a node's, or there is one of that name.
    pub fn insert(&self, node: Arc<Node>) -> Result<()> {
        check_name(node.name())?;
        let mut state = self.state();
        if state.get(node.name()).is_some() {
            return Err(Error::Invalid(format!(
                "Duplicate nodes with node-name='{}'",
                node.name()
            )));
        }
        state.add_nodes(vec![node]);
        Ok(())
    }

    /// Closes a node that nobody uses, and those that were opened with it. The image is flushed.
    ///
    /// # Errors
    /// If there is no such node, it is in use, or a flush fails; the node stays then.
    pub fn remove(&self, name: &str) -> Result<()> {
        let missing = || Error::Invalid(format!("Failed to find node with node-name='{name}'"));
        let node = self.get(name).ok_or_else(missing)?;
        check_unused(&self.state(), &node)?;
        let writes = |node: &Node| !node.read_only() && !node.is_inactive();
        if writes(&node) {
            // Without the lock, for it can take long; what little comes after is flushed below.
            node.flush()?;
        }
        let mut state = self.state();
        if !state.get(name).is_some_and(|now| Arc::ptr_eq(now, &node)) {
            return Err(missing());
        }
        check_unused(&state, &node)?;
        if writes(&node) {
            node.flush()?;
            // An error can be returned here; when the last handle is dropped it could only be logged.
            if let Some(image) = node.qcow2() {
                image.store_bitmaps().and_then(|()| image.settle()).inspect_err(|_| {
                    // The node stays and may be written to: its bitmaps follow again.
                    if let Err(e) = image.resume_bitmaps() {
                        tracing::warn!(
                            node = name,
                            "writes are refused until its bitmaps can be marked: {e}"
                        );
                    }
                })?;
            }
        }
        state.forget(&node);
        let orphans = state.forget_orphans();
        state.put_locks_back();
        drop(state);
        // Outside the lock: closing an image takes as long as the disk takes.
        drop((node, orphans));
        Ok(())
    }
}

impl State {
    /// Takes nodes in that were opened.
    fn add_nodes(&mut self, made: Vec<Arc<Node>>) {
        if self.holds > 0 {
            // Their requests would wait halfway down, at the gates of the nodes below.
            self.made_while_held.extend(made.iter().map(|node| node.hold_gate()));
        }
        self.nodes.extend(made);
    }

    fn forget(&mut self, node: &Arc<Node>) {
        self.nodes.retain(|other| !Arc::ptr_eq(other, node));
        self.edges.retain(|edge| edge.parent != Parent::Node(node.name().to_owned()));
    }

    /// Refuses a node that is a backing file.
    fn check_no_overlay(&self, name: &str) -> Result<()> {
        for edge in self.users_of(name) {
            if let (Role::Backing, Parent::Node(overlay)) = (edge.role, &edge.parent) {
                return Err(Error::Invalid(format!(
                    "Node '{name}' is busy: node is used as backing hd of '{overlay}'"
                )));
            }
        }
        Ok(())
    }

    /// Nodes that were made for others go with these, top-down; the caller drops them.
    #[must_use]
    fn forget_orphans(&mut self) -> Vec<Arc<Node>> {
        let implicit: HashMap<&str, &Arc<Node>> = self
            .nodes
            .iter()
            .filter(|node| node.details().implicit)
            .map(|node| (node.name(), node))
            .collect();
        let mut uses: HashMap<&str, usize> = HashMap::new();
        let mut children: HashMap<&str, Vec<&str>> = HashMap::new();
        for edge in &self.edges {
            *uses.entry(&edge.child).or_default() += 1;
            if let Parent::Node(parent) = &edge.parent {
                children.entry(parent).or_default().push(&edge.child);
            }
        }
        let unused = |node: &&Arc<Node>| {
            implicit.contains_key(node.name()) && !uses.contains_key(node.name())
        };
        let mut orphans: Vec<Arc<Node>> = self.nodes.iter().filter(unused).cloned().collect();
        // Each one's children may have lost their last user with it.
        let mut next = 0;
        while let Some(orphan) = orphans.get(next).cloned() {
            next += 1;
            for child in children.get(orphan.name()).into_iter().flatten() {
                if let Some(left) = uses.get_mut(child) {
                    *left -= 1;
                    if *left == 0 {
                        orphans.extend(implicit.get(child).map(|node| Arc::clone(node)));
                    }
                }
            }
        }
        let gone: HashSet<&str> = orphans.iter().map(|node| node.name()).collect();
        self.nodes.retain(|node| !gone.contains(node.name()));
        self.edges
            .retain(|edge| !matches!(&edge.parent, Parent::Node(n) if gone.contains(n.as_str())));
        orphans
    }
}

fn check_unused(state: &State, node: &Arc<Node>) -> Result<()> {
    let name = node.name();
    let lasting = |edge: &Edge| match &edge.parent {
        Parent::User { id, .. } => state.followers.contains_key(id),
        Parent::Node(_) => false,
    };
    // A device, an export, or the one that QEMU writes to a target by.
    if state.users_of(name).any(lasting) || state.is_written_by_job(name) {
        return Err(Error::Invalid(format!("Node {name} is in use")));
    }
    state.check_unclaimed(name)?;
    if node.check_no_job().is_err() {
        return Err(Error::Invalid(format!("Block device {name} is in use")));
    }
    if state.users_of(name).any(|edge| matches!(edge.parent, Parent::User { .. })) {
        return Err(Error::Invalid(format!("Node {name} is in use")));
    }
    state.check_no_overlay(name)?;
    if node.details().implicit {
        return Err(Error::Invalid(format!("Node {name} is not owned by the monitor")));
    }
    match state.users_of(name).next() {
        None => Ok(()),
        Some(_) => Err(Error::Invalid(format!("Block device {name} is in use"))),
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses names that no node can have.
///
/// # Errors
/// With QEMU's text.
pub fn check_name(name: &str) -> Result<()> {
    const LONGEST: usize = 31;
    if !is_well_formed(name) {
        return Err(Error::Invalid(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > LONGEST {
        return Err(Error::Invalid("Node name too long".to_owned()));
    }
    Ok(())
}
