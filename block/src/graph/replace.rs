//! Other nodes in the places of those that are in use, while requests go on: all steps of a change or
//! none. See `docs/graph.md`, "Replacing nodes".
//!
//! Order:
//!
//! 1. the uses of all nodes after the steps are computed and checked against each other;
//! 2. file locks are widened to what both states need: another process's use is found here;
//! 3. the gates of nodes that lose a user or a child, and of all above them, are closed from the top
//!    down; what has to be made anew is made;
//! 4. links and children are set, locks are reduced, gates open. This cannot fail.
//!
//! Up to 4 a failure leaves all as it was.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::build::{self, Built};
use super::open::not_found;
use super::options::{Driver, NodeOptions};
use super::permissions::{Edge, Parent, Role, Uses, reached_from, reaches, that_reach};
use super::{Graph, State, locks};
use crate::format::Format;
use crate::node::{Closed, Details, Link, Node};
use crate::{Error, Result};

/// A part of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Who uses `from` uses `to`: devices, exports and nodes, but neither commands and jobs nor what
    /// is at or below `to`.
    Replace {
        /// The node that is left.
        from: String,
        /// The node that takes its place.
        to: String,
    },
    /// `node` reads from `backing` what it does not have itself.
    Backing {
        /// The overlay, a qcow2 node.
        node: String,
        /// What is below it from now on; `None` for nothing, which reads as zeroes.
        backing: Option<String>,
    },
}

impl Graph {
    /// Has all that use `from` use `to`. See [`Step::Replace`].
    ///
    /// # Errors
    /// As [`Graph::change`].
    pub fn replace(&self, from: &str, to: &str) -> Result<()> {
        self.change(&[Step::Replace { from: from.to_owned(), to: to.to_owned() }])
    }

    /// Puts `overlay` on top of `node`: it reads from `node`, and who used `node` uses it.
    ///
    /// # Errors
    /// As [`Graph::change`].
    pub fn append(&self, node: &str, overlay: &str) -> Result<()> {
        self.change(&[
            Step::Backing { node: overlay.to_owned(), backing: Some(node.to_owned()) },
            Step::Replace { from: node.to_owned(), to: overlay.to_owned() },
        ])
    }

    /// Whether [`Graph::change`] could make these steps now, as far as this process is concerned.
    ///
    /// # Errors
    /// As [`Graph::change`].
    pub(crate) fn check_change(&self, steps: &[Step]) -> Result<()> {
        plan(&self.state(), steps).map(drop)
    }

    /// Makes all steps, in order, with requests held back meanwhile, or none of them. What images
    /// name as their backing file stays as it is.
    ///
    /// # Errors
    /// There is no such node, a loop would come about, uses of a node exclude each other, a format
    /// keeps its bytes in a node that is to be replaced, or another process uses a file. All is as it
    /// was then.
    pub fn change(&self, steps: &[Step]) -> Result<()> {
        let mut state = self.state();
        let (edges, moves, uses) = plan(&state, steps)?;
        let widened = locks::widen(&state.nodes, &uses);
        let prepared = widened.and_then(|()| prepare(&state, &moves));
        let (gates, sets) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                state.put_locks_back();
                return Err(error);
            }
        };
        for set in sets {
            set.make(&gates);
        }
        state.edges = edges;
        drop(gates);
        let orphans = state.forget_orphans();
        state.put_locks_back();
        drop(state);
        // Outside the lock: closing an image takes as long as the disk takes.
        drop(orphans);
        Ok(())
    }
}

/// The uses after the steps, those that are others than now, and what they come to: step 1.
fn plan(state: &State, steps: &[Step]) -> Result<(Vec<Edge>, Vec<Move>, Uses)> {
    let edges = edges_after(state, steps)?;
    let moves = moves(state, &edges);
    for moved in &moves {
        moved.check(state)?;
    }
    let uses = locks::check(&edges, &state.nodes)?;
    Ok((edges, moves, uses))
}

/// The uses after the steps.
fn edges_after(state: &State, steps: &[Step]) -> Result<Vec<Edge>> {
    let mut edges = state.edges.clone();
    for step in steps {
        match step {
            Step::Replace { from, to } => {
                for name in [from, to] {
                    state.get(name).ok_or_else(|| not_found(name))?;
                }
                let below = reached_from(&edges, [to.as_str()]);
                let stays: Vec<bool> =
                    edges.iter().map(|edge| stays(state, edge, &below)).collect();
                for (edge, stays) in edges.iter_mut().zip(stays) {
                    if edge.child == *from && !stays {
                        edge.child.clone_from(to);
                    }
                }
            }
            Step::Backing { node, backing } => {
                let overlay = state.get(node).ok_or_else(|| not_found(node))?;
                if overlay.qcow2().is_none() {
                    return Err(Error::Invalid(format!(
                        "Driver '{}' of node '{node}' does not support backing files",
                        overlay.driver()
                    )));
                }
                let parent = Parent::Node(node.clone());
                edges.retain(|edge| edge.parent != parent || edge.role != Role::Backing);
                let Some(child) = backing else { continue };
                state.get(child).ok_or_else(|| not_found(child))?;
                if reaches(&edges, child, node) {
                    return Err(Error::Invalid(format!(
                        "Making '{child}' a backing child of '{node}' would create a cycle"
                    )));
                }
                let child = child.clone();
                edges.push(Edge { parent, child, label: "backing", role: Role::Backing });
            }
        }
    }
    Ok(edges)
}

/// Whether a use of a node stays there when another takes the node's place, which has all of `below`
/// at or below it.
fn stays(state: &State, edge: &Edge, below: &HashSet<&str>) -> bool {
    match &edge.parent {
        Parent::User { id, .. } => !state.followers.contains_key(id),
        Parent::Node(parent) => below.contains(parent.as_str()),
    }
}

/// A use that is another after the change.
struct Move {
    parent: Parent,
    role: Role,
    from: Option<String>,
    to: Option<String>,
}

/// What tells the uses apart that one parent makes.
#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Node(&'a str, &'static str),
    User(u64),
}

fn key(edge: &Edge) -> Key<'_> {
    match &edge.parent {
        Parent::Node(name) => Key::Node(name, edge.label),
        Parent::User { id, .. } => Key::User(*id),
    }
}

fn moves(state: &State, after: &[Edge]) -> Vec<Move> {
    let new: HashMap<_, _> = after.iter().map(|edge| (key(edge), edge)).collect();
    let mut moves: Vec<Move> = Vec::new();
    for old in &state.edges {
        let new = new.get(&key(old));
        if new.is_some_and(|new| new.child == old.child) {
            continue;
        }
        moves.push(Move {
            parent: old.parent.clone(),
            role: old.role,
            from: Some(old.child.clone()),
            to: new.map(|new| new.child.clone()),
        });
    }
    let old: HashSet<_> = state.edges.iter().map(key).collect();
    for new in after.iter().filter(|new| !old.contains(&key(new))) {
        let (parent, role) = (new.parent.clone(), new.role);
        moves.push(Move { parent, role, from: None, to: Some(new.child.clone()) });
    }
    moves
}

impl Move {
    /// Refuses what cannot be made.
    fn check(&self, state: &State) -> Result<()> {
        let Parent::Node(parent) = &self.parent else { return Ok(()) };
        let node = state.get(parent).ok_or_else(|| not_found(parent))?;
        let filters = matches!(
            node.details().options,
            Some(NodeOptions { driver: Driver::Compress { .. }, .. })
        );
        if self.role == Role::Backing || (filters && self.to.is_some()) {
            return Ok(());
        }
        Err(Error::NotSupported(format!(
            "Node '{}' cannot be replaced: node '{parent}' keeps its bytes in it",
            self.from.as_deref().unwrap_or_default()
        )))
    }
}

/// A change of one use, which cannot fail any more.
enum Set {
    Link { link: Link, to: Arc<Node> },
    Backing { node: Arc<Node>, to: Option<(Arc<Node>, Arc<dyn Format>)>, filename: String },
    Filter { node: Arc<Node>, built: Box<Built> },
}

/// Closed gates by the names of their nodes.
type Gates = BTreeMap<String, Closed>;

/// Step 3: closed gates, and what is to be set.
fn prepare(state: &State, moves: &[Move]) -> Result<(Gates, Vec<Set>)> {
    // A user's requests are at the node it leaves, a node's own are on their way to what it leaves.
    let held: BTreeSet<&str> = moves
        .iter()
        .filter_map(|moved| match &moved.parent {
            Parent::Node(parent) => Some(parent.as_str()),
            Parent::User { .. } => moved.from.as_deref(),
        })
        .collect();
    let concerned = that_reach(&state.edges, held);
    let top_down = state.top_down();
    let closed = top_down.iter().filter(|node| concerned.contains(node.name()));
    let gates = closed.map(|node| (node.name().to_owned(), node.close_gate())).collect();
    let sets = moves.iter().filter_map(|moved| set(state, moved).transpose());
    Ok((gates, sets.collect::<Result<_>>()?))
}

fn set(state: &State, moved: &Move) -> Result<Option<Set>> {
    let find = |name: &str| state.get(name).cloned().ok_or_else(|| not_found(name));
    let to = moved.to.as_deref().map(find).transpose()?;
    let parent = match (&moved.parent, &to) {
        (Parent::Node(name), _) => find(name)?,
        (Parent::User { id, .. }, Some(to)) => {
            let link = state.followers.get(id).cloned();
            return Ok(link.map(|link| Set::Link { link, to: to.clone() }));
        }
        (Parent::User { .. }, None) => return Ok(None),
    };
    let details = parent.details();
    match (moved.role, to) {
        (Role::Backing, to) => {
            let filename = build::name_over(&details, to.as_deref());
            let to = to.map(|to| (to.clone(), build::below(to)));
            Ok(Some(Set::Backing { node: parent, to, filename }))
        }
        (_, Some(to)) => {
            let mut built = build::compress_node(&to, details.flags)?;
            built.details = Details {
                bitmaps: details.bitmaps.clone(),
                options: details.options.clone(),
                inherits_from: details.inherits_from.clone(),
                implicit: details.implicit,
                ..built.details
            };
            Ok(Some(Set::Filter { node: parent, built: Box::new(built) }))
        }
        (_, None) => Ok(None),
    }
}

impl Set {
    fn make(self, gates: &Gates) {
        match self {
            Self::Link { link, to } => link.set(to),
            Self::Backing { node, to, filename } => {
                if let Some(closed) = gates.get(node.name()) {
                    node.set_backing(closed, to, filename);
                }
            }
            Self::Filter { node, built } => {
                if let Some(closed) = gates.get(node.name()) {
                    node.replace(closed, built.format, built.details);
                }
            }
        }
    }
}
