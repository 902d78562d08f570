//! Jobs that act before a node's contents change.

use std::sync::{Arc, Mutex};

use super::hold::Held;
use super::permissions::Parent;
use super::{Graph, State, lock};
use crate::node::{Interceptor, Node};
use crate::{Error, Result};

/// Changes of a node that make a job write to another.
pub(super) struct Feed {
    id: u64,
    pub(super) from: Arc<Node>,
    pub(super) to: Arc<Node>,
}

/// Changes of a node go through an interceptor until this is dropped, which waits for those under way.
pub(crate) struct Intercepting {
    node: Arc<Node>,
    interceptor: Arc<dyn Interceptor>,
    id: u64,
    state: Arc<Mutex<State>>,
}

impl Graph {
    /// Refuses the file of a format, whose changes do not come through its node.
    pub(crate) fn check_no_format_above(&self, name: &str) -> Result<()> {
        let state = self.state();
        if state.get(name).is_none_or(|node| node.details().host.is_none()) {
            return Ok(());
        }
        let above = state.users_of(name).find_map(|edge| match &edge.parent {
            Parent::Node(above) => Some((above, edge.label)),
            Parent::User { .. } => None,
        });
        match above {
            Some((above, label)) => Err(Error::Invalid(format!(
                "Node '{name}' is busy: node is used as {label} of '{above}'"
            ))),
            None => Ok(()),
        }
    }

    /// Has changes of `from`, which is held, go through `interceptor`, which writes to `to`.
    pub(crate) fn intercept(
        &self,
        _held: &Held,
        from: &Arc<Node>,
        to: &Arc<Node>,
        interceptor: Arc<dyn Interceptor>,
    ) -> Intercepting {
        let mut state = self.state();
        let id = state.next_user;
        state.next_user += 1;
        state.feeds.push(Feed { id, from: from.clone(), to: to.clone() });
        from.intercept(interceptor.clone());
        Intercepting { node: from.clone(), interceptor, id, state: Arc::clone(&self.state) }
    }
}

impl Drop for Intercepting {
    fn drop(&mut self) {
        // First, as whoever holds the target until then has to hold these changes, too.
        self.node.unintercept(&self.interceptor);
        lock(&self.state).feeds.retain(|feed| feed.id != self.id);
    }
}
