//! Who may use a node for what: QEMU's permission model (`block.c`, "bdrv_node_refresh_perm").
//!
//! Every use of a node is an [`Edge`]: from a parent, which is another node, a device or an export.
//! An edge says what its parent does with the node and what it lets other parents do. For devices
//! and exports that is given; for nodes it follows from what their own parents do, so it is
//! computed from the top of the graph down. A graph in which one parent of a node does what another
//! does not allow is refused before anything is changed.
//!
//! The outcome for a file's node is what its image locks tell other processes.

use std::collections::{BTreeMap, HashMap};

use crate::perm::{Perm, Permissions};
use crate::{Error, Result};

mod growing;
mod order;

pub(super) use growing::Growing;
pub(super) use order::{parents_first, reached_from, reaches, that_reach};

/// How a parent node uses a child: QEMU's BdrvChildRole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The parent passes all through (raw).
    Filtered,
    /// A part of the child (raw with offset or size).
    Part,
    /// Data and metadata of a format.
    Image,
    /// Data of a format whose metadata is elsewhere.
    Data,
    /// What the parent does not have itself is read from there.
    Backing,
}

impl Role {
    /// What the parent needs of the child when its own parents need `above` together.
    fn child(self, writable: bool, above: Permissions) -> Permissions {
        match self {
            Self::Filtered => above,
            Self::Backing => Permissions {
                used: above.used & Perm::CONSISTENT_READ,
                shared: backing_shared(above.shared),
            },
            Self::Image => data(metadata(writable, above)),
            Self::Data => data(above),
            // As a data file, but writes past the end of the part never come.
            Self::Part => {
                let Permissions { used, shared } = data(above);
                let writes = Perm::WRITE | Perm::RESIZE;
                Permissions { used: (used - writes) | (above.used & writes), shared }
            }
        }
    }
}

/// Who changes a backing file changes what its overlays read, so only those may allow it who can
/// live with changes themselves.
fn backing_shared(above: Perm) -> Perm {
    let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    if above.contains(Perm::WRITE) { shared | Perm::WRITE | Perm::RESIZE } else { shared }
}

/// A format may write its metadata although nobody writes to it; nobody else may.
fn metadata(writable: bool, above: Permissions) -> Permissions {
    let mut used = above.used | Perm::CONSISTENT_READ;
    if writable {
        used |= Perm::WRITE | Perm::RESIZE;
    }
    Permissions { used, shared: above.shared - (Perm::WRITE | Perm::RESIZE) }
}

/// A format that is written to may write past the end of its data, and relies on its size.
fn data(above: Permissions) -> Permissions {
    let mut used = above.used;
    if used.contains(Perm::WRITE_UNCHANGED) {
        used |= Perm::WRITE;
    }
    if used.contains(Perm::WRITE) {
        used |= Perm::RESIZE;
    }
    Permissions { used, shared: above.shared - Perm::RESIZE }
}

/// Who uses a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Another node, by name.
    Node(String),
    /// A device or an export.
    User {
        /// Tells users apart.
        id: u64,
        /// How QEMU calls it: "block device 'vda'", "an unnamed block device".
        description: String,
        permissions: Permissions,
        /// Hides from the nodes below what others need of this one: it does that for them.
        below_others: bool,
    },
}

impl Parent {
    /// The name, of a node.
    fn node(&self) -> Option<&str> {
        match self {
            Self::Node(name) => Some(name),
            Self::User { .. } => None,
        }
    }
}

/// One use of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) parent: Parent,
    /// Name of the node that is used.
    pub(crate) child: String,
    /// QEMU's name of the child: "file", "backing", "data-file", "root".
    pub(crate) label: &'static str,
    pub(crate) role: Role,
}

impl Edge {
    fn is_below_others(&self) -> bool {
        matches!(self.parent, Parent::User { below_others: true, .. })
    }

    fn describe(&self) -> String {
        let parent = match &self.parent {
            Parent::Node(name) => format!("node '{name}'"),
            Parent::User { description, .. } => description.clone(),
        };
        format!("{parent} (uses node '{}' as '{}' child)", self.child, self.label)
    }
}

/// What the rules need to know of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) writable: bool,
    /// Whether it is writable now; differs from `writable` while a reopen is checked.
    pub(crate) was_writable: bool,
    pub(crate) force_share: bool,
    /// Other processes may do with it what they like: nothing is done with it here.
    pub(crate) inactive: bool,
}

/// What is done with every node, by name.
pub(crate) type Uses = BTreeMap<String, Permissions>;

/// Computes what is done with every node, in a graph whose edges are in the order of their making.
///
/// # Errors
/// A parent does what another does not allow, or writes to a node that is read-only; QEMU's text.
pub(crate) fn check(edges: &[Edge], nodes: &BTreeMap<String, Facts>) -> Result<Uses> {
    let mut uses = compute(edges, nodes)?;
    // After those that are computed from them.
    for (name, _) in nodes.iter().filter(|(_, facts)| facts.inactive) {
        uses.insert(name.clone(), Permissions::NONE);
    }
    Ok(uses)
}

/// As [`check`], as if all nodes were active.
fn compute(edges: &[Edge], nodes: &BTreeMap<String, Facts>) -> Result<Uses> {
    let mut uses_of: HashMap<&str, Vec<&Edge>> = HashMap::new();
    for edge in edges {
        uses_of.entry(&edge.child).or_default().push(edge);
    }
    let mut uses = Uses::new();
    for name in parents_first(edges, nodes) {
        let Some(facts) = nodes.get(name) else { continue };
        let edges = uses_of.get(name).into_iter().flatten().rev();
        let above = edges.map(|edge| (*edge, of_edge(edge, facts, nodes, &uses))).collect();
        let all = of_node(name, facts, above)?;
        uses.insert(name.to_owned(), all);
    }
    Ok(uses)
}

/// What is done with a node by those above it. They come newest first, as QEMU lists them: it decides
/// which conflict is told of.
fn of_node(name: &str, facts: &Facts, above: Vec<(&Edge, Permissions)>) -> Result<Permissions> {
    // As if it were between the node and the others, like QEMU's filters of jobs.
    let (below, others): (Vec<_>, Vec<_>) =
        above.into_iter().partition(|(edge, _)| edge.is_below_others());
    no_conflict(name, &others)?;
    let mut all = others.iter().fold(Permissions::NONE, |all, (_, p)| all.and(*p));
    if !below.is_empty() {
        let writes = Perm::WRITE | Perm::WRITE_UNCHANGED;
        all = Permissions { used: all.used & writes, shared: Perm::all() };
    }
    all = below.iter().fold(all, |all, (_, p)| all.and(*p));
    if !facts.writable && all.used.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
        return Err(Error::Invalid(if facts.was_writable {
            format!("Read-only block node '{name}' cannot support read-write users")
        } else {
            "Block node is read-only".to_owned()
        }));
    }
    Ok(all)
}

fn of_edge(
    edge: &Edge,
    child: &Facts,
    nodes: &BTreeMap<String, Facts>,
    uses: &Uses,
) -> Permissions {
    match &edge.parent {
        Parent::User { permissions, .. } => *permissions,
        Parent::Node(parent) => {
            let writable = nodes.get(parent).is_some_and(|facts| facts.writable);
            let above = uses.get(parent).copied().unwrap_or(Permissions::NONE);
            let mut needed = edge.role.child(writable, above);
            if child.force_share {
                needed.shared = Perm::all();
            }
            needed
        }
    }
}

fn no_conflict(name: &str, above: &[(&Edge, Permissions)]) -> Result<()> {
    let all = above.iter().fold(Permissions::NONE, |all, (_, p)| all.and(*p));
    if all.shared.contains(all.used) {
        // What is found for nearly every node without looking at pairs.
        return Ok(());
    }
    for (a, (allows, shared)) in above.iter().enumerate() {
        for (b, (needs, used)) in above.iter().enumerate() {
            let denied = used.used - shared.shared;
            if a != b && !denied.is_empty() {
                return Err(Error::Invalid(format!(
                    "Permission conflict on node '{name}': permissions '{denied}' are both required by {} and unshared by {}.",
                    needs.describe(),
                    allows.describe(),
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn node(parent: &str, child: &str, label: &'static str, role: Role) -> Edge {
        Edge { parent: Parent::Node(parent.to_owned()), child: child.to_owned(), label, role }
    }

    pub(super) fn user(id: u64, child: &str, used: Perm, shared: Perm) -> Edge {
        let permissions = Permissions { used, shared };
        let description = "an unnamed block device".to_owned();
        let parent = Parent::User { id, description, permissions, below_others: false };
        Edge { parent, child: child.to_owned(), label: "root", role: Role::Filtered }
    }

    pub(super) fn facts(writable: &[&str], read_only: &[&str]) -> BTreeMap<String, Facts> {
        let of = |names: &[&str], writable| {
            let facts = Facts { writable, was_writable: writable, ..Facts::default() };
            names.iter().map(|name| ((*name).to_owned(), facts)).collect::<Vec<_>>()
        };
        of(writable, true).into_iter().chain(of(read_only, false)).collect()
    }

    pub(super) const READ: Perm = Perm::CONSISTENT_READ;
    pub(super) const SHARED: Perm = Perm::all().difference(Perm::RESIZE);

    #[test]
    fn a_device_that_does_not_share_writes_excludes_a_writable_export() {
        let guest = READ | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        let edges =
            [user(0, "d", READ | Perm::WRITE, guest), user(1, "d", READ | Perm::WRITE, SHARED)];
        let error = check(&edges, &facts(&["d"], &[])).unwrap_err().to_string();
        assert_eq!(
            error,
            "Permission conflict on node 'd': permissions 'write' are both required by an unnamed block device (uses node 'd' as 'root' child) and unshared by an unnamed block device (uses node 'd' as 'root' child)."
        );
        let edges = [edges[0].clone(), user(1, "d", READ, SHARED)];
        check(&edges, &facts(&["d"], &[])).unwrap();
        let sharing = [user(0, "d", READ | Perm::WRITE, guest | Perm::WRITE), edges[1].clone()];
        check(&sharing, &facts(&["d"], &[])).unwrap();
    }

    #[test]
    fn two_formats_on_one_file_conflict_and_the_newer_is_said_to_deny() {
        let edges = [node("a", "f", "file", Role::Image), node("b", "f", "file", Role::Image)];
        let error = check(&edges, &facts(&["a", "b", "f"], &[])).unwrap_err().to_string();
        assert_eq!(
            error,
            "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'a' (uses node 'f' as 'file' child) and unshared by node 'b' (uses node 'f' as 'file' child)."
        );
        check(&edges, &facts(&["f"], &["a", "b"])).unwrap();
    }

    #[test]
    fn a_backing_file_is_written_only_while_nobody_relies_on_the_overlay() {
        let chain = [node("top", "base", "backing", Role::Backing)];
        let nodes = facts(&["top", "base"], &[]);
        let write = user(1, "base", READ | Perm::WRITE, SHARED);
        check(&[chain[0].clone(), write.clone()], &nodes).unwrap();
        let reader = user(2, "top", READ, READ | Perm::WRITE_UNCHANGED);
        let error = check(&[chain[0].clone(), write, reader], &nodes).unwrap_err().to_string();
        assert!(error.contains("permissions 'write' are both required by an unnamed"), "{error}");
        assert!(error.contains("unshared by node 'top' (uses node 'base' as 'backing'"), "{error}");
    }

    #[test]
    fn what_is_hidden_below_a_user_lets_it_write_there_and_nobody_else() {
        let chain = [
            node("overlay", "top", "backing", Role::Backing),
            node("top", "base", "backing", Role::Backing),
            user(1, "overlay", READ | Perm::WRITE, READ | Perm::WRITE_UNCHANGED),
        ];
        let nodes = facts(&["overlay"], &["top"]);
        let nodes: BTreeMap<_, _> = nodes.into_iter().chain(facts(&["base"], &[])).collect();
        let shared = READ | Perm::WRITE_UNCHANGED;
        let writer = user(2, "base", READ | Perm::WRITE | Perm::RESIZE, shared);
        let mut reader = user(3, "top", READ, Perm::all());
        let with = |more: &[Edge]| check(&[&chain[..], more].concat(), &nodes).map(drop);
        with(&[reader.clone(), writer.clone()]).unwrap_err();
        if let Parent::User { below_others, .. } = &mut reader.parent {
            *below_others = true;
        }
        with(&[reader.clone(), writer.clone()]).unwrap();
        let other = node("x", "base", "backing", Role::Backing);
        let reads = user(4, "x", READ, shared);
        let nodes: BTreeMap<_, _> = nodes.clone().into_iter().chain(facts(&["x"], &[])).collect();
        let edges = [&chain[..], &[reader, writer, other, reads]].concat();
        let error = check(&edges, &nodes).unwrap_err().to_string();
        assert!(error.contains("unshared by node 'x' (uses node 'base' as 'backing'"), "{error}");
    }

    #[test]
    fn a_file_carries_what_the_formats_above_need() {
        let edges = [node("a", "f", "file", Role::Image), node("r", "f", "file", Role::Filtered)];
        let uses = check(&edges, &facts(&["a", "f", "r"], &[])).unwrap();
        assert_eq!(uses["f"], Permissions::of_image(true, false));
        let uses = check(&edges, &facts(&["f", "r"], &["a"])).unwrap();
        assert_eq!(uses["f"], Permissions::of_image(false, false));
        let uses = check(&edges[1..], &facts(&["f", "r"], &[])).unwrap();
        assert_eq!(uses["f"], Permissions::NONE);
    }

    #[test]
    fn writers_of_read_only_nodes_are_refused() {
        let edges = [node("a", "f", "file", Role::Image)];
        let error = |nodes: &BTreeMap<_, _>| check(&edges, nodes).unwrap_err().to_string();
        let mut nodes = facts(&["a"], &["f"]);
        assert_eq!(error(&nodes), "Block node is read-only");
        nodes.get_mut("f").unwrap().was_writable = true;
        assert_eq!(error(&nodes), "Read-only block node 'f' cannot support read-write users");
    }
}
