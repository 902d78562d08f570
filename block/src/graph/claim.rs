//! Claims of block jobs on nodes: what nobody else may do with these meanwhile.

use std::sync::{Arc, Mutex};

use super::open::not_found;
use super::{Graph, State, lock};
use crate::node::Occupied;
use crate::{Error, Result};

/// Nodes of a job; they are free again when this is dropped.
pub struct Claim {
    _occupied: Vec<Occupied>,
    id: u64,
    state: Arc<Mutex<State>>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.state).claims.remove(&self.id);
    }
}

/// What is claimed, and by which kind of job.
pub(super) struct Claimed {
    nodes: Vec<String>,
    job: &'static str,
}

impl Graph {
    /// Claims nodes for a block job; `job` is its type as QMP has it. Requests and exports go on, but
    /// the nodes can be neither in another job nor get overlays, another size or other backing files.
    ///
    /// # Errors
    /// There is no such node, or it is claimed already; QEMU's text.
    pub fn claim(&self, nodes: &[&str], job: &'static str) -> Result<Claim> {
        let mut state = self.state();
        let mut occupied = Vec::with_capacity(nodes.len());
        for name in nodes {
            let node = state.get(name).ok_or_else(|| not_found(name))?;
            state.check_unclaimed(name)?;
            occupied.push(node.occupy(job)?);
        }
        let id = state.next_user;
        state.next_user += 1;
        let nodes = nodes.iter().map(|&name| name.to_owned()).collect();
        state.claims.insert(id, Claimed { nodes, job });
        Ok(Claim { _occupied: occupied, id, state: Arc::clone(&self.state) })
    }

    /// Refuses a node that is claimed by a block job.
    ///
    /// # Errors
    /// It is; QEMU's text.
    pub fn check_unclaimed(&self, node: &str) -> Result<()> {
        self.state().check_unclaimed(node)
    }
}

impl State {
    /// Whether it is what a mirror or a commit writes to.
    pub(super) fn is_written_by_job(&self, name: &str) -> bool {
        let writes = |claim: &Claimed| {
            matches!(claim.job, "mirror" | "commit")
                && claim.nodes.last().is_some_and(|last| last == name)
        };
        self.claims.values().any(writes)
    }

    pub(super) fn check_unclaimed(&self, name: &str) -> Result<()> {
        match self.claims.values().rev().find(|claim| claim.nodes.iter().any(|n| n == name)) {
            None => Ok(()),
            Some(Claimed { job, .. }) => Err(Error::Invalid(format!(
                "Node '{name}' is busy: block device is in use by block job: {job}"
            ))),
        }
    }
}
