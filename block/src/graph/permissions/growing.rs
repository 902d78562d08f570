//! The uses of a graph to which nodes are added one after another.
//!
//! A new use changes what is done with the node that is used, and perhaps with those below it; only these
//! are looked at. So a chain is opened in a time that grows with its length, though every step is
//! checked before the next image is read.

use std::collections::{BTreeMap, HashMap};

use super::{Edge, Facts, Uses, compute, of_edge, of_node};
use crate::Result;
use crate::perm::Permissions;

/// A graph whose uses go together, at every moment.
pub(in crate::graph) struct Growing {
    /// In the order of their making.
    edges: Vec<Edge>,
    /// Places of the uses of a node, and of its uses of others.
    above: HashMap<String, Vec<usize>>,
    below: HashMap<String, Vec<usize>>,
    nodes: BTreeMap<String, Facts>,
    /// As if all nodes were active.
    uses: Uses,
}

impl Growing {
    /// Begins with a graph.
    ///
    /// # Errors
    /// As [`super::check`].
    pub(in crate::graph) fn new(edges: Vec<Edge>, nodes: BTreeMap<String, Facts>) -> Result<Self> {
        let uses = compute(&edges, &nodes)?;
        let (above, below) = (HashMap::new(), HashMap::new());
        let mut growing = Self { edges: Vec::new(), above, below, nodes, uses };
        for edge in edges {
            growing.push(edge);
        }
        Ok(growing)
    }

    fn push(&mut self, edge: Edge) {
        let place = self.edges.len();
        self.above.entry(edge.child.clone()).or_default().push(place);
        if let Some(parent) = edge.parent.node() {
            self.below.entry(parent.to_owned()).or_default().push(place);
        }
        self.edges.push(edge);
    }

    /// Whether there is a node of this name.
    pub(in crate::graph) fn has(&self, name: &str) -> bool {
        self.nodes.contains_key(name)
    }

    /// Takes a node in, or what is known of it now.
    ///
    /// # Errors
    /// As [`super::check`].
    pub(in crate::graph) fn put(&mut self, name: &str, facts: Facts) -> Result<()> {
        if self.nodes.insert(name.to_owned(), facts).is_some_and(|old| old != facts) {
            self.refresh(self.children(name))?;
        }
        Ok(())
    }

    /// Adds a use. Gives the nodes with which something else is done now.
    ///
    /// # Errors
    /// As [`super::check`].
    pub(in crate::graph) fn connect(&mut self, edge: Edge) -> Result<Vec<String>> {
        let child = edge.child.clone();
        self.push(edge);
        self.refresh(vec![child])
    }

    /// What is done with a node.
    pub(in crate::graph) fn of(&self, name: &str) -> Permissions {
        match self.nodes.get(name) {
            Some(facts) if facts.inactive => Permissions::NONE,
            _ => self.computed(name),
        }
    }

    fn computed(&self, name: &str) -> Permissions {
        self.uses.get(name).copied().unwrap_or(Permissions::NONE)
    }

    pub(in crate::graph) fn into_edges(self) -> Vec<Edge> {
        self.edges
    }

    fn children(&self, name: &str) -> Vec<String> {
        let places = self.below.get(name).into_iter().flatten();
        places.map(|&place| self.edges[place].child.clone()).collect()
    }

    /// Looks at nodes again, and at those below as long as something changes. That ends: there are no
    /// loops, and a change from above makes all uses below greater, or all smaller.
    fn refresh(&mut self, mut left: Vec<String>) -> Result<Vec<String>> {
        let mut changed = Vec::new();
        while let Some(name) = left.pop() {
            let Some(facts) = self.nodes.get(&name) else { continue };
            let edges = self.above.get(&name).into_iter().flatten().rev();
            let above = edges.map(|&place| {
                let edge = &self.edges[place];
                (edge, of_edge(edge, facts, &self.nodes, &self.uses))
            });
            let now = of_node(&name, facts, above.collect())?;
            if self.computed(&name) == now {
                continue;
            }
            left.extend(self.children(&name));
            self.uses.insert(name.clone(), now);
            changed.push(name);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{READ, SHARED, facts, node, user};
    use super::super::{Role, check};
    use super::*;
    use crate::perm::Perm;

    /// Uses as they come one after another lead to what the whole comes to, and to the same refusals.
    #[test]
    fn a_graph_that_grows_has_the_uses_of_the_whole() {
        let edges = [
            node("base", "f", "file", Role::Image),
            node("top", "base", "backing", Role::Backing),
            node("other", "base", "backing", Role::Backing),
            user(1, "other", READ, SHARED),
            user(2, "top", READ | Perm::WRITE, READ | Perm::WRITE_UNCHANGED),
            user(3, "base", READ | Perm::WRITE, SHARED),
        ];
        for nodes in
            [facts(&["top"], &["base", "f", "other"]), facts(&["top", "base", "f"], &["other"])]
        {
            // From every place on: what was there before, and what came later.
            for start in 0..edges.len() {
                let mut growing = Growing::new(edges[..start].to_vec(), nodes.clone()).unwrap();
                for end in start..edges.len() {
                    let grown = growing.connect(edges[end].clone());
                    let whole = check(&edges[..=end], &nodes);
                    match (grown, whole) {
                        (Ok(_), Ok(whole)) => {
                            for name in nodes.keys() {
                                assert_eq!(growing.of(name), whole[name], "{name} {start} {end}");
                            }
                        }
                        (Err(grown), Err(whole)) => {
                            assert_eq!(grown.to_string(), whole.to_string());
                            assert_eq!(end, edges.len() - 1);
                        }
                        (grown, whole) => panic!("{grown:?} {whole:?}"),
                    }
                }
                assert_eq!(growing.into_edges(), edges);
            }
        }
    }

    #[test]
    fn what_becomes_of_a_node_changes_the_uses_below_it() {
        let (writable, read_only) = (facts(&["a"], &[]), facts(&[], &["a"]));
        let mut growing = Growing::new(Vec::new(), facts(&["f"], &[])).unwrap();
        assert!(growing.has("f") && !growing.has("a"));
        growing.put("a", writable["a"]).unwrap();
        assert_eq!(growing.connect(node("a", "f", "file", Role::Image)).unwrap(), ["f"]);
        assert_eq!(growing.of("f"), Permissions::of_image(true, false));
        growing.put("a", read_only["a"]).unwrap();
        assert_eq!(growing.of("f"), Permissions::of_image(false, false));
    }
}
