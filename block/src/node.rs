//! Named images.

use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::format::Format;
use crate::qcow2::Qcow2;
use crate::storage::Storage;

/// An image with a name: QEMU's block node. Devices, checkpoints and exports all go through it.
pub struct Node {
    name: String,
    format: Arc<dyn Format>,
    details: Details,
    users: Mutex<Vec<String>>,
}

/// What the graph knows of a node beyond its format.
#[derive(Default)]
pub(crate) struct Details {
    pub(crate) filename: String,
    pub(crate) storage: Option<Arc<dyn Storage>>,
    pub(crate) qcow2: Option<Arc<Qcow2>>,
    /// The protocol node below.
    pub(crate) file: Option<Arc<Node>>,
    /// The image below.
    pub(crate) backing: Option<Arc<Node>>,
    /// The backing file's name with its directory, if the image names one.
    pub(crate) full_backing: Option<String>,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    /// Made together with another node, and goes with it.
    pub(crate) implicit: bool,
}

impl Node {
    /// Names an open image.
    pub fn new(name: impl Into<String>, format: Arc<dyn Format>) -> Self {
        Self::with_details(name.into(), format, Details::default())
    }

    pub(crate) fn with_details(name: String, format: Arc<dyn Format>, details: Details) -> Self {
        Self { name, format, details, users: Mutex::default() }
    }

    /// The node's name, unique in its graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image.
    pub fn format(&self) -> &Arc<dyn Format> {
        &self.format
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.format.read_only()
    }

    /// The file it is in, as QMP shows it; empty for a node outside a graph.
    pub fn filename(&self) -> &str {
        &self.details.filename
    }

    /// The image below this one.
    pub fn backing(&self) -> Option<&Arc<Node>> {
        self.details.backing.as_ref()
    }

    pub(crate) fn details(&self) -> &Details {
        &self.details
    }

    pub(crate) fn storage(&self) -> Option<&Arc<dyn Storage>> {
        self.details.storage.as_ref()
    }

    pub(crate) fn qcow2(&self) -> Option<&Arc<Qcow2>> {
        self.details.qcow2.as_ref()
    }

    /// Who uses the node: devices and exports, not other nodes.
    pub(crate) fn users(&self) -> MutexGuard<'_, Vec<String>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debug for Node {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("name", &self.name).finish_non_exhaustive()
    }
}
