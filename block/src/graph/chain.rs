//! Chains of backing files: finding images in them, and what images name as the one below.

use std::sync::Arc;

use super::build;
use super::open::{no_such_node, not_found};
use super::permissions::{Parent, Role};
use super::{Graph, locks};
use crate::node::Node;
use crate::perm::Perm;
use crate::{Error, Result};

impl Graph {
    /// The node and all below it, top-down.
    ///
    /// # Errors
    /// There is no such node.
    pub(crate) fn chain(&self, top: &str) -> Result<Vec<Arc<Node>>> {
        let top = self.get(top).ok_or_else(|| not_found(top))?;
        Ok(std::iter::successors(Some(top), |node| node.backing()).collect())
    }

    /// The nodes that read from `node`.
    pub(crate) fn overlays(&self, node: &str) -> Vec<String> {
        let state = self.state();
        let overlays = state.users_of(node).filter(|edge| edge.role == Role::Backing);
        let names = overlays.filter_map(|edge| match &edge.parent {
            Parent::Node(name) => Some(name.clone()),
            Parent::User { .. } => None,
        });
        names.collect()
    }

    /// Refuses a node that is the backing file of another.
    pub(crate) fn check_no_overlay(&self, node: &str) -> Result<()> {
        self.state().check_no_overlay(node)
    }

    /// Refuses a node that another one is over, or that a job works on: in QEMU its filter is over it.
    ///
    /// # Errors
    /// One is; QEMU's text.
    pub fn check_root(&self, node: &str) -> Result<()> {
        let state = self.state();
        let below = state.users_of(node).any(|edge| matches!(edge.parent, Parent::Node(_)));
        let in_job = state.get(node).is_some_and(|node| node.check_no_job().is_err());
        if below || in_job {
            return Err(Error::Invalid("Need a root block node".to_owned()));
        }
        Ok(())
    }

    /// Whether somebody writes to a node.
    pub(crate) fn is_written(&self, node: &str) -> Result<bool> {
        let state = self.state();
        let uses = locks::check(&state.edges, &state.nodes)?;
        Ok(uses.get(node).is_some_and(|uses| uses.used.contains(Perm::WRITE)))
    }

    /// change-backing-file: has the image of `node` name another backing file, the node below being the
    /// same. `device` is the node at the top of its chain.
    ///
    /// # Errors
    /// With QEMU's texts; the image is as it was then.
    pub fn change_backing_file(&self, device: &str, node: &str, name: &str) -> Result<()> {
        self.get(device).ok_or_else(|| not_found(device))?;
        self.check_root(device)?;
        let image = self.get(node).ok_or_else(|| no_such_node(node))?;
        let Some(below) = image.backing() else {
            return Err(Error::Invalid(
                "not allowing backing file change on an image without a backing file".to_owned(),
            ));
        };
        self.check_unclaimed(device)?;
        if !self.chain(device)?.iter().any(|other| Arc::ptr_eq(other, &image)) {
            return Err(Error::Invalid(format!(
                "'{device}' and image file are not in the same chain"
            )));
        }
        self.check_unclaimed(node)?;
        let name = (!name.is_empty()).then_some((name, below.driver()));
        drop(image);
        self.record_backing(node, name)
    }

    /// Has the image of a node name another backing file and its format, or none. A node that refuses
    /// writes takes this one.
    ///
    /// **Order.** The name is durable when this returns; a crash leaves the old one or the new one
    /// (`Header::write`). Both must lead to the same disk when it is called: what is to be left out
    /// of a chain is durable elsewhere before, and what is left out goes afterwards.
    pub(crate) fn record_backing(&self, node: &str, name: Option<(&str, &str)>) -> Result<()> {
        let read_only = self.get(node).ok_or_else(|| not_found(node))?.read_only();
        let failed = |error: Error| match &name {
            Some((name, _)) => {
                Error::Invalid(format!("Could not change backing file to '{name}': {error}"))
            }
            None => error,
        };
        if read_only {
            self.set_read_only(node, false).map_err(failed)?;
        }
        let result = self.write_backing(node, name);
        if read_only && let Err(error) = self.set_read_only(node, true) {
            tracing::warn!(node, "takes writes from now on: {error}");
        }
        result.map_err(failed)
    }

    fn write_backing(&self, node: &str, name: Option<(&str, &str)>) -> Result<()> {
        let state = self.state();
        let node = state.get(node).cloned().ok_or_else(|| not_found(node))?;
        let Some(image) = node.qcow2() else {
            return Err(Error::NotSupported(format!(
                "node '{}' has no place for the name of a backing file",
                node.name()
            )));
        };
        let (file, format) = name.unzip();
        let full = match file {
            Some(name) => Some(build::full_name(&node.details(), name)?),
            None => None,
        };
        image.set_backing(file, format)?;
        node.set_full_backing(full, build::name_over);
        Ok(())
    }
}

/// The place in a chain of the image that its overlay names so, or that has that path.
pub(crate) fn find_image(chain: &[Arc<Node>], name: &str) -> Option<usize> {
    let is_it = |overlay: &Node, node: &Node| {
        let details = overlay.details();
        let recorded = details.qcow2.as_ref().and_then(|image| image.info().backing_file);
        let full = build::full_name(&details, name).ok();
        let real = |name: &str| std::fs::canonicalize(name).ok();
        recorded.as_deref() == Some(name)
            || node.filename() == name
            || full.is_some_and(|full| {
                real(&full).is_some_and(|full| Some(full) == real(&node.filename()))
            })
    };
    chain.windows(2).position(|pair| is_it(&pair[0], &pair[1])).map(|at| at + 1)
}
