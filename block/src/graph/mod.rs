//! The nodes of a machine, by name: blockdev-add, blockdev-del and who uses what.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::node::Node;
use crate::{Error, Result};

mod info;
mod open;
mod options;
pub mod text;

pub use info::{CacheInfo, ImageInfo, NodeInfo, snapshot_json};

use open::Opener;
use options::{NodeOptions, Source, is_well_formed};

/// All nodes. Safe to use from several threads.
#[derive(Default)]
pub struct Graph {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// In order of their making.
    nodes: Vec<Arc<Node>>,
    /// Number of the next name that is made up.
    next: u32,
}

impl State {
    fn get(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.iter().find(|node| node.name() == name)
    }

    /// The node that has `node` as its backing image.
    fn overlay_of(&self, node: &Arc<Node>) -> Option<&Arc<Node>> {
        self.nodes.iter().find(|n| n.backing().is_some_and(|b| Arc::ptr_eq(&b, node)))
    }

    /// Whether a format node keeps its bytes in `node`.
    fn is_file_child(&self, node: &Arc<Node>) -> bool {
        let is = |n: &&Arc<Node>| n.details().file.as_ref().is_some_and(|f| Arc::ptr_eq(f, node));
        self.nodes.iter().any(|n| is(&n))
    }
}

/// A use of a node by a device or an export; ends when dropped.
pub struct Attachment {
    node: Arc<Node>,
    user: String,
}

impl Attachment {
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut users = self.node.users();
        if let Some(at) = users.iter().position(|user| *user == self.user) {
            users.swap_remove(at);
        }
    }
}

impl Graph {
    /// A graph without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a node and those below it as QMP's `BlockdevOptions` say.
    ///
    /// # Errors
    /// With QEMU's text where QEMU has one. Nothing is left open after an error.
    pub fn add(&self, options: &Value) -> Result<Arc<Node>> {
        self.open(&NodeOptions::parse(options, Source::Json)?)
    }

    /// As [`Graph::add`] for the command line: `key=value,...` or JSON.
    pub fn add_text(&self, options: &str) -> Result<Arc<Node>> {
        let (value, source) = text::parse(options)?;
        self.open(&NodeOptions::parse(&value, source)?)
    }

    fn open(&self, options: &NodeOptions) -> Result<Arc<Node>> {
        if options.node_name.is_none() {
            return Err(Error::Invalid(
                "'node-name' must be specified for the root node".to_owned(),
            ));
        }
        // Held while files are opened: names stay free and a node cannot go away meanwhile.
        let mut state = self.state();
        let mut opener = Opener::new(&state.nodes, state.next);
        let node = opener.open_root(options)?;
        let (made, next) = opener.into_made();
        state.nodes.extend(made);
        state.next = next;
        Ok(node)
    }

    /// The node of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Node>> {
        self.state().get(name).cloned()
    }

    /// All nodes, newest first.
    pub fn list(&self) -> Vec<Arc<Node>> {
        self.state().nodes.iter().rev().cloned().collect()
    }

    /// Closes a node that nobody uses, and those that were opened with it. The image is flushed.
    ///
    /// # Errors
    /// If there is no such node, it is in use, or a flush fails; the node stays then.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut state = self.state();
        let Some(node) = state.get(name).cloned() else {
            return Err(Error::Invalid(format!("Failed to find node with node-name='{name}'")));
        };
        if let Some(overlay) = state.overlay_of(&node) {
            return Err(Error::Invalid(format!(
                "Node '{name}' is busy: node is used as backing hd of '{}'",
                overlay.name()
            )));
        }
        if node.details().implicit {
            return Err(Error::Invalid(format!("Node {name} is not owned by the monitor")));
        }
        if state.is_file_child(&node) || !node.users().is_empty() {
            return Err(Error::Invalid(format!("Block device {name} is in use")));
        }
        if !node.read_only() {
            node.format().flush()?;
            // Here an error can be told; at the end of the last handle it could only be logged.
            if let Some(image) = node.qcow2() {
                image.store_bitmaps()?;
            }
        }
        state.nodes.retain(|n| !Arc::ptr_eq(n, &node));
        // Children that only this node had go with it, top-down.
        while let Some(at) = state.nodes.iter().position(|n| {
            n.details().implicit && !state.is_file_child(n) && state.overlay_of(n).is_none()
        }) {
            state.nodes.remove(at);
        }
        Ok(())
    }

    /// Makes a device or an export a user of a node. `writable` use excludes other writable use.
    ///
    /// # Errors
    /// If there is no such node, it is read-only, or something else has it.
    pub fn attach(&self, name: &str, user: &str, writable: bool) -> Result<Attachment> {
        let state = self.state();
        let Some(node) = state.get(name) else {
            return Err(Error::Invalid(format!(
                "Cannot find device='{name}' nor node-name='{name}'"
            )));
        };
        if writable && node.read_only() {
            return Err(Error::Invalid("Block node is read-only".to_owned()));
        }
        if let Some(overlay) = state.overlay_of(node).filter(|_| writable) {
            return Err(Error::Invalid(format!(
                "Node '{name}' is busy: node is used as backing hd of '{}'",
                overlay.name()
            )));
        }
        if state.is_file_child(node) {
            return Err(Error::Invalid(format!("Block device {name} is in use")));
        }
        let mut users = node.users();
        if let Some(other) = users.first().filter(|_| writable) {
            return Err(Error::Invalid(format!(
                "Permission conflict on node '{name}': permissions 'write' are both required by {user} and unshared by {other}"
            )));
        }
        users.push(user.to_owned());
        Ok(Attachment { node: node.clone(), user: user.to_owned() })
    }
}

/// Refuses names that QEMU refuses.
fn check_name(name: &str) -> Result<()> {
    const LONGEST: usize = 31;
    if !is_well_formed(name) {
        return Err(Error::Invalid(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > LONGEST {
        return Err(Error::Invalid("Node name too long".to_owned()));
    }
    Ok(())
}
