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
use std::sync::MutexGuard;

use serde_json::Value;

use super::open::not_found;
use super::options::{NodeOptions, Source};
use super::{Graph, State, locks, permissions};
use crate::{Error, Result};

mod plan;
mod swap;

use plan::Plan;
pub(super) use plan::Planner;
use swap::{Swap, facts, new_edges, prepare};

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

#[cfg(test)]
mod tests;
