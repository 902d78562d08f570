//! Which nodes are above and below which. Everything here takes as long as the graph has nodes and
//! uses, so that chains of thousands of images are no matter.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Edge, Facts, Parent};

/// The nodes in an order in which each comes after all its parents.
pub(in crate::graph) fn parents_first<'a>(
    edges: &[Edge],
    nodes: &'a BTreeMap<String, Facts>,
) -> Vec<&'a str> {
    let known = |name: &String| nodes.get_key_value(name).map(|(name, _)| name.as_str());
    // How many uses of a node come from nodes that are not in the order yet.
    let mut waits: HashMap<&str, usize> = HashMap::new();
    let mut children: HashMap<&str, Vec<&str>> = HashMap::new();
    for edge in edges {
        let Parent::Node(parent) = &edge.parent else { continue };
        if let (Some(parent), Some(child)) = (known(parent), known(&edge.child)) {
            *waits.entry(child).or_default() += 1;
            children.entry(parent).or_default().push(child);
        }
    }
    let all = || nodes.keys().map(String::as_str);
    let mut order = Vec::with_capacity(nodes.len());
    let mut now: Vec<&str> = all().filter(|name| !waits.contains_key(name)).collect();
    while !now.is_empty() {
        let mut next = Vec::new();
        for child in now.iter().filter_map(|name| children.get(name)).flatten() {
            if let Some(left) = waits.get_mut(child) {
                *left -= 1;
                if *left == 0 {
                    next.push(*child);
                }
            }
        }
        // By name, as the first ones: which conflict is told of does not depend on chance.
        next.sort_unstable();
        order.append(&mut now);
        now = next;
    }
    // A loop and what is below it; the graph refuses loops before they come here.
    order.extend(all().filter(|name| waits.get(name).is_some_and(|left| *left > 0)));
    order
}

/// These nodes and all that are below them.
pub(in crate::graph) fn reached_from<'a>(
    edges: &'a [Edge],
    tops: impl IntoIterator<Item = &'a str>,
) -> HashSet<&'a str> {
    follow(tops, edges.iter().filter_map(|edge| Some((edge.parent.node()?, edge.child.as_str()))))
}

/// These nodes and all that are above them.
pub(in crate::graph) fn that_reach<'a>(
    edges: &'a [Edge],
    bottoms: impl IntoIterator<Item = &'a str>,
) -> HashSet<&'a str> {
    follow(
        bottoms,
        edges.iter().filter_map(|edge| Some((edge.child.as_str(), edge.parent.node()?))),
    )
}

/// Whether `below` is reached from `above`.
pub(in crate::graph) fn reaches(edges: &[Edge], above: &str, below: &str) -> bool {
    reached_from(edges, [above]).contains(below)
}

fn follow<'a>(
    from: impl IntoIterator<Item = &'a str>,
    steps: impl Iterator<Item = (&'a str, &'a str)>,
) -> HashSet<&'a str> {
    let mut to: HashMap<&str, Vec<&str>> = HashMap::new();
    for (here, there) in steps {
        to.entry(here).or_default().push(there);
    }
    let mut left: Vec<&str> = from.into_iter().collect();
    let mut seen: HashSet<&str> = left.iter().copied().collect();
    while let Some(name) = left.pop() {
        for there in to.get(name).into_iter().flatten() {
            if seen.insert(there) {
                left.push(there);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    fn edge(parent: &str, child: &str) -> Edge {
        let parent = Parent::Node(parent.to_owned());
        Edge { parent, child: child.to_owned(), label: "backing", role: Role::Backing }
    }

    #[test]
    fn reachability_follows_edges_in_one_direction_only() {
        let edges = [edge("a", "b"), edge("b", "c"), edge("x", "c")];
        assert!(reaches(&edges, "a", "c"));
        assert!(reaches(&edges, "a", "a"));
        assert!(!reaches(&edges, "c", "a"));
        assert_eq!(reached_from(&edges, ["x"]), HashSet::from(["x", "c"]));
        assert_eq!(that_reach(&edges, ["b"]), HashSet::from(["a", "b"]));
        assert_eq!(that_reach(&edges, ["c"]), HashSet::from(["a", "b", "c", "x"]));
    }

    #[test]
    fn parents_come_first_and_a_loop_ends() {
        let facts = Facts::default();
        let nodes = |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), facts)).collect();
        // A node that is reached in one step and in two.
        let edges = [edge("z", "b"), edge("b", "a"), edge("z", "a"), edge("gone", "b")];
        assert_eq!(parents_first(&edges, &nodes(&["a", "b", "c", "z"])), ["c", "z", "b", "a"]);
        let looped = [edge("a", "b"), edge("b", "a"), edge("b", "c")];
        assert_eq!(parents_first(&looped, &nodes(&["a", "b", "c", "d"])), ["d", "a", "b", "c"]);
    }
}
