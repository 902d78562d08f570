//! Named images.

use std::sync::Arc;

use crate::format::Format;

/// An image with a name: QEMU's block node. Devices, checkpoints and exports all go through it.
pub struct Node {
    name: String,
    format: Arc<dyn Format>,
}

impl Node {
    /// Names an open image.
    pub fn new(name: impl Into<String>, format: Arc<dyn Format>) -> Self {
        Self { name: name.into(), format }
    }

    /// The node's name, unique in its graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image.
    pub fn format(&self) -> &Arc<dyn Format> {
        &self.format
    }
}
