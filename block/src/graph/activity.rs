//! Nodes whose images another process writes: opened for reading, without locks.
//!
//! When a machine moves to another process, both have its images open for a while. Only one of them has
//! *active* nodes. A node that is inactive says of itself that it is as writable as it will be, but
//! holds no lock and its image refuses writes; it reads what the image was when it became so.
//!
//! Order: [`Graph::inactivate`] flushes, stores bitmaps and counts, puts an image that only reads in the
//! place of each (`reopen/mod.rs` has the steps), and gives up the locks last. [`Graph::activate`]
//! takes the locks first, then reads each image anew. Both are for all nodes or for none.

use std::sync::Arc;

use super::options::Driver;
use super::permissions::{Parent, Role};
use super::reopen::{Planner, carry_out};
use super::{Graph, State};
use crate::node::Node;
use crate::perm::Perm;
use crate::{Error, Result};

impl Graph {
    /// Nodes that are opened from now on are inactive, until [`Graph::activate`].
    pub fn open_inactive(&self) {
        self.state().inactive = true;
    }

    /// Makes every writable node inactive.
    ///
    /// # Errors
    /// A job or an export uses one, or an image cannot be written: all are as they were then.
    pub fn inactivate(&self) -> Result<()> {
        let state = self.state();
        let of = |node: &&Arc<Node>| !node.read_only() && !node.is_inactive();
        let nodes: Vec<_> = state.nodes.iter().filter(of).cloned().collect();
        for node in &nodes {
            state.check_only_devices(node)?;
        }
        let plans = Planner::of_activity(&state, &nodes, true)?;
        carry_out(state, &plans)
    }

    /// Makes every node active.
    ///
    /// # Errors
    /// Another process uses an image, or it cannot be opened: all are as they were then.
    pub fn activate(&self) -> Result<()> {
        let mut state = self.state();
        let opens_inactive = std::mem::replace(&mut state.inactive, false);
        let nodes: Vec<_> = state.nodes.iter().filter(|n| n.is_inactive()).cloned().collect();
        if nodes.is_empty() {
            return Ok(());
        }
        let plans = Planner::of_activity(&state, &nodes, false)?;
        let result = carry_out(state, &plans);
        if result.is_err() {
            self.state().inactive = opens_inactive;
        }
        result
    }

    /// Whether any node is inactive.
    pub fn has_inactive(&self) -> bool {
        self.state().nodes.iter().any(|node| node.is_inactive())
    }
}

impl State {
    /// Refuses a node on which somebody else than the guest works.
    fn check_only_devices(&self, node: &Arc<Node>) -> Result<()> {
        let name = node.name();
        self.check_unclaimed(name)?;
        node.check_no_job()?;
        let mut writers = self.users_of(name).filter_map(|edge| match &edge.parent {
            Parent::User { description, permissions, .. } if edge.role == Role::Filtered => {
                let writes = permissions.used.contains(Perm::WRITE);
                (writes && !description.starts_with("block device '")).then_some(description)
            }
            _ => None,
        });
        match writers.next() {
            Some(_) => Err(Error::Invalid(format!(
                "Node '{name}' is busy: an export or a command writes to it"
            ))),
            None => Ok(()),
        }
    }
}

/// Whether a node can be opened anew: others pass all on to one that can.
pub(super) fn has_image(node: &Node) -> bool {
    let details = node.details();
    details.options.as_ref().is_some_and(|o| !matches!(o.driver, Driver::Compress { .. }))
}
