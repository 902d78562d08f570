//! Graphs of qcow2 images with a device on top.

use std::path::Path;
use std::sync::Arc;

use block::{Attachment, Graph, Node, User};
use serde_json::{Value, json};

use crate::common::path;

/// Adds an image; without `backing` over what it names itself.
pub(crate) fn add(graph: &Graph, name: &str, image: &Path, backing: Option<Value>) -> Arc<Node> {
    let mut options = json!({
        "driver": "qcow2", "node-name": name,
        "file": {"driver": "file", "filename": path(image)},
    });
    if let Some(backing) = backing {
        options["backing"] = backing;
    }
    graph.add(&options).unwrap()
}

/// A writable disk of a guest.
pub(crate) fn device(graph: &Graph, node: &str) -> Attachment {
    graph.attach(node, User::device("vda", true, false)).unwrap()
}

/// All that QMP tells: what a refusal must leave alone.
pub(crate) fn picture(graph: &Graph) -> Vec<String> {
    let of = |node: &Arc<Node>| serde_json::to_string(&node.info(false).unwrap()).unwrap();
    graph.list().iter().map(of).collect()
}
