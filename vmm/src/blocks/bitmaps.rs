//! The block-dirty-bitmap commands.

use std::sync::Arc;

use block::bitmap::{Bitmap, NewBitmap};
use block::{Graph, Node};
use qmp::schema::{BitmapAddArguments, BitmapMergeArguments};
use serde_json::Value;

use super::{Blocks, failed};

impl Blocks {
    /// block-dirty-bitmap-add.
    pub(super) fn add_bitmap(&self, arguments: &BitmapAddArguments) -> Result<(), qmp::Error> {
        let name = &arguments.node;
        // QEMU has another text here than for the other commands.
        let node = self.graph.get(name).ok_or_else(|| qmp::Error::no_node(name))?;
        node.add_bitmap(&NewBitmap {
            name: &arguments.name,
            granularity: arguments.granularity.map(u64::from),
            persistent: arguments.persistent.unwrap_or(false),
            disabled: arguments.disabled.unwrap_or(false),
        })
        .map_err(failed)
    }

    /// block-dirty-bitmap-merge.
    pub(super) fn merge_bitmaps(&self, arguments: &BitmapMergeArguments) -> Result<(), qmp::Error> {
        merge(&self.graph, arguments)
    }

    /// Does something with the bitmaps of a node.
    pub(super) fn with_bitmaps(
        &self,
        node: &str,
        action: impl FnOnce(&Node) -> block::Result<()>,
    ) -> Result<(), qmp::Error> {
        action(&*find(&self.graph, node)?).map_err(failed)
    }
}

fn find(graph: &Graph, name: &str) -> Result<Arc<Node>, qmp::Error> {
    graph.get(name).ok_or_else(|| qmp::Error::generic(format!("Node '{name}' not found")))
}

fn merge(graph: &Graph, arguments: &BitmapMergeArguments) -> Result<(), qmp::Error> {
    let node = find(graph, &arguments.node)?;
    // QEMU tells of the target first.
    node.bitmaps().get(&arguments.target).map_err(failed)?;
    let sources: Vec<Arc<Bitmap>> = arguments
        .bitmaps
        .iter()
        .enumerate()
        .map(|(index, source)| find_source(graph, &node, index, source))
        .collect::<Result<_, _>>()?;
    node.merge_bitmaps(&arguments.target, &sources).map_err(failed)
}

/// A source of a merge: a name, or an object of `node` and `name`.
fn find_source(
    graph: &Graph,
    node: &Arc<Node>,
    index: usize,
    source: &Value,
) -> Result<Arc<Bitmap>, qmp::Error> {
    let object = match source {
        Value::String(name) => return node.bitmaps().get(name).map_err(failed),
        Value::Object(object) => object,
        _ => {
            return Err(qmp::Error::generic(
                "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
            ));
        }
    };
    let member = |name: &str| match object.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(_) => Err(qmp::Error::invalid_type(&format!("bitmaps[{index}].{name}"), "string")),
        None => Err(qmp::Error::missing_parameter(&format!("bitmaps[{index}].{name}"))),
    };
    let (other, name) = (member("node")?, member("name")?);
    if let Some(key) = object.keys().find(|key| !matches!(key.as_str(), "node" | "name")) {
        return Err(qmp::Error::unexpected_parameter(&format!("bitmaps[{index}].{key}")));
    }
    let Some(other) = graph.get(other) else {
        return Err(qmp::Error::generic(format!("Node '{other}' not found")));
    };
    other.bitmaps().get(name).map_err(failed)
}

#[cfg(test)]
mod tests {
    use block::WriteBuf;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_merge_takes_names_and_objects_and_refuses_with_the_texts_of_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let graph = Graph::new();
        for (name, size) in [("d", 1 << 20), ("r", 1 << 20), ("small", 1 << 16)] {
            let file = dir.path().join(name);
            std::fs::write(&file, vec![0; size]).unwrap();
            let options = json!({
                "driver": "raw", "node-name": name,
                "file": {"driver": "file", "filename": file},
            });
            let node = graph.add(&options).unwrap();
            for name in ["a", "b"] {
                node.add_bitmap(&NewBitmap { name, ..NewBitmap::default() }).unwrap();
            }
        }
        let node = |name| graph.get(name).unwrap();
        node("r").write(0x2_0000, &[WriteBuf::new(&[1])]).unwrap();
        node("d").clear_bitmap("b").unwrap();
        let run = |target: &str, bitmaps: Value| {
            let arguments = json!({"node": "d", "target": target, "bitmaps": bitmaps});
            let arguments = serde_json::from_value(arguments).unwrap();
            merge(&graph, &arguments).map_err(|error| error.to_string())
        };
        run("a", json!(["b", {"node": "r", "name": "a"}])).unwrap();
        assert_eq!(node("d").bitmaps().get("a").unwrap().dirty_bytes(), 65536);
        run("a", json!([])).unwrap();
        for (target, bitmaps, text) in [
            ("no", json!(["b"]), "Dirty bitmap 'no' not found"),
            ("b", json!(["no"]), "Dirty bitmap 'no' not found"),
            ("b", json!([{"node": "nx", "name": "b"}]), "Node 'nx' not found"),
            ("b", json!([5]), "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr"),
            ("b", json!([{"node": "r"}]), "Parameter 'bitmaps[0].name' is missing"),
            (
                "b",
                json!([{"node": "r", "name": "a", "x": 1}]),
                "Parameter 'bitmaps[0].x' is unexpected",
            ),
            (
                "b",
                json!(["a", {"node": "small", "name": "a"}]),
                "Bitmaps are of different sizes (destination size is 1048576, source size is 65536) and can't be merged",
            ),
        ] {
            let error = run(target, bitmaps).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        assert_eq!(node("d").bitmaps().get("b").unwrap().dirty_bytes(), 0, "all or nothing");
    }
}
