//! Holding requests back while several changes are made.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::open::not_found;
use super::permissions::{parents_first, that_reach};
use super::{Graph, State, lock, locks};
use crate::Result;
use crate::node::{Holding, Node};

/// Requests are held back until this is dropped. Changes of the graph are not.
///
/// Whoever has it must not send requests through a node ([`Node::format`] does not go through its gate),
/// nor wait for a device or a client that has requests to finish.
pub struct Held {
    gates: Vec<Holding>,
    state: Arc<Mutex<State>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let made = {
            let mut state = lock(&self.state);
            state.holds -= 1;
            if state.holds == 0 { std::mem::take(&mut state.made_while_held) } else { Vec::new() }
        };
        // From the bottom up: a request that is let in finds all gates below open.
        while let Some(gate) = self.gates.pop() {
            drop(gate);
        }
        drop(made);
    }
}

impl Graph {
    /// Holds back requests to these nodes and to all above them, and waits for those in flight. Nodes
    /// that are made meanwhile are held, too.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn hold(&self, names: &[&str]) -> Result<Held> {
        let state = self.state();
        for name in names {
            state.get(name).ok_or_else(|| not_found(name))?;
        }
        let wanted: Vec<_> = {
            let names = that_reach(&state.edges, names.iter().copied());
            let wanted = |node: &Arc<Node>| names.contains(node.name());
            state.top_down().into_iter().filter(wanted).collect()
        };
        Ok(self.hold_these(state, &wanted))
    }

    /// As [`Graph::hold`], of all nodes.
    pub fn hold_all(&self) -> Held {
        let state = self.state();
        let all = state.top_down();
        self.hold_these(state, &all)
    }

    /// `wanted` are top-down.
    fn hold_these(
        &self,
        mut state: std::sync::MutexGuard<'_, State>,
        wanted: &[Arc<Node>],
    ) -> Held {
        let is_wanted = |node: &Arc<Node>| wanted.iter().any(|other| Arc::ptr_eq(node, other));
        // Changes that are intercepted first, also those that make a job write to one of these nodes:
        // what is under way may need any of the gates.
        let feeding = state.feeds.iter().filter(|feed| is_wanted(&feed.to)).map(|feed| &feed.from);
        let mut gates: Vec<_> =
            wanted.iter().chain(feeding).map(|node| node.hold_changes()).collect();
        gates.extend(wanted.iter().map(|node| node.hold_gate()));
        state.holds += 1;
        Held { gates, state: Arc::clone(&self.state) }
    }
}

impl State {
    /// All nodes, each after those that use it.
    pub(super) fn top_down(&self) -> Vec<Arc<Node>> {
        let all = self.nodes.iter().map(|n| (n.name().to_owned(), locks::facts(n))).collect();
        let by_name: HashMap<&str, &Arc<Node>> = self.nodes.iter().map(|n| (n.name(), n)).collect();
        let order = parents_first(&self.edges, &all);
        order.into_iter().filter_map(|name| by_name.get(name).map(|n| Arc::clone(n))).collect()
    }
}
