//! block-commit of an image that is written to: a mirror into an image below it.
//!
//! ```text
//!   guest ──> top ──> middle ──> base        becomes        guest ──> base
//! ```
//!
//! **Order.** The base gets copies of what the top reads, and the top goes on to have all of it: what is
//! read through the top stays the same at every moment, and after a crash too. The base is durable
//! before it takes the top's place, which is a change in memory only: no image names another one
//! afterwards. Whoever starts the guest again after a crash before that takes the top, after it either.

use crate::graph::{Claim, Graph, User};
use crate::jobs::mirror::{Below, Mirror, MirrorHandle, MirrorOptions};
use crate::jobs::{Control, OnError, Operation, SyncMode};
use crate::{Error, Perm, Permissions, Result};

/// A commit of the active image; see the module.
pub(super) struct Active {
    graph: Graph,
    base: String,
    mirror: Mirror,
    was_read_only: bool,
}

impl Active {
    /// `chain` goes from the top to the base, both included.
    pub(super) fn new(graph: &Graph, chain: &[&str], on_error: OnError) -> Result<Self> {
        let (Some(&top), Some(&base)) = (chain.first(), chain.last()) else {
            return Err(Error::Invalid("cannot commit an image into itself".to_owned()));
        };
        if let Some(overlay) = graph.overlays(top).first() {
            return Err(Error::NotSupported(format!(
                "Node '{top}' is written to below its overlay '{overlay}': it cannot be committed"
            )));
        }
        let was_read_only = graph.chain(base)?[0].read_only();
        let claim = graph.claim(chain, "commit")?;
        if was_read_only {
            graph.set_read_only(base, false)?;
        }
        let started = start(graph, chain, on_error, claim);
        let mirror = started.inspect_err(|_| {
            if was_read_only && let Err(error) = graph.set_read_only(base, true) {
                tracing::debug!(node = base, "stays writable: {error}");
            }
        })?;
        Ok(Self { graph: graph.clone(), base: base.to_owned(), mirror, was_read_only })
    }

    pub(super) fn handle(&self) -> MirrorHandle {
        self.mirror.handle()
    }

    /// Has the base refuse writes again, unless it is the guest's now.
    fn put_back(&mut self) {
        if std::mem::take(&mut self.was_read_only)
            && let Err(error) = self.graph.set_read_only(&self.base, true)
        {
            tracing::debug!(node = self.base, "stays writable: {error}");
        }
    }
}

fn start(graph: &Graph, chain: &[&str], on_error: OnError, claim: Claim) -> Result<Mirror> {
    let (top, base) = (chain[0], chain[chain.len() - 1]);
    // Who reads through the top does not see what is written to the base.
    let reader = graph.attach(top, User::below_others(Perm::CONSISTENT_READ, Perm::all()))?;
    let used = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    let writer = graph.attach(base, User::unnamed(used, shared))?;
    let options = MirrorOptions {
        on_source_error: on_error,
        on_target_error: on_error,
        ..MirrorOptions::new(top, base, SyncMode::Top)
    };
    let images = u32::try_from(chain.len() - 1).unwrap_or(u32::MAX);
    let writing = Permissions { used, shared };
    Mirror::into_below(graph, options, Below { attached: [reader, writer], writing, claim, images })
}

impl Operation for Active {
    fn run(&mut self, control: &Control) -> Result<()> {
        self.mirror.grow_target()?;
        self.mirror.run(control)
    }

    fn commit(&mut self) -> Result<()> {
        self.mirror.commit()?;
        if self.mirror.completes() {
            // The guest writes to the base from now on, so it must stay writable.
            self.was_read_only = false;
        }
        self.mirror.release();
        self.put_back();
        Ok(())
    }

    fn abort(&mut self) {
        self.mirror.abort();
        self.mirror.release();
        self.put_back();
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.abort();
    }
}
