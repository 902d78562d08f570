//! The images that are changed: an overlay with bitmaps over one of two bases.

use std::path::{Path, PathBuf};

use block::qcow2::check;
use block::qcow2::create::{CreateOptions, create};
use block::storage::{FileOptions, FileStorage};
use block::{Graph, Node, Progress, ReadBuf, WriteBuf};
use serde_json::{Value, json};

pub(crate) const SIZE: usize = 256 << 10;
const NAMES: [&str; 3] = ["one.qcow2", "two.qcow2", "top.qcow2"];

pub(crate) fn file(image: &Path) -> Value {
    json!({"driver": "file", "filename": image.display().to_string()})
}

/// An image as a node of its own.
pub(crate) fn qcow2(name: &str, image: &Path, more: &Value) -> Value {
    let mut options = json!({"driver": "qcow2", "node-name": name, "file": file(image)});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

pub(crate) fn write(node: &Node, at: usize, byte: u8) -> block::Result<()> {
    node.write(at as u64, &[WriteBuf::new(&[byte; 3000])])
}

pub(crate) fn disk(node: &Node) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    node.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

pub(crate) fn make(image: &Path, options: &CreateOptions) -> block::Result<()> {
    std::fs::write(image, []).unwrap();
    let storage = FileStorage::open(image, FileOptions::default()).unwrap();
    create(&storage, None, options, &Progress::default())
}

pub(crate) fn small() -> CreateOptions {
    CreateOptions { size: SIZE as u64, cluster_size: Some(4096), ..CreateOptions::default() }
}

/// The check finds leaks at most.
pub(crate) fn check_sound(image: &Path, case: &str) {
    let options = FileOptions { read_only: true, ..FileOptions::default() };
    let storage = FileStorage::open(image, options).unwrap();
    let report = check::check(&storage, &check::Options::default()).unwrap();
    let found = (report.corruptions, report.check_errors);
    assert_eq!(found, (0, 0), "{case}: {}: {:?}", image.display(), report.findings);
}

/// The images, to be copied for each try.
pub(crate) struct Images(tempfile::TempDir);

impl Images {
    pub(crate) fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, byte) in [("one.qcow2", 1), ("two.qcow2", 2)] {
            make(&at(name), &small()).unwrap();
            let graph = Graph::new();
            let node = graph.add(&qcow2("d", &at(name), &json!({}))).unwrap();
            node.write(0, &[WriteBuf::new(&vec![byte; SIZE / 2])]).unwrap();
        }
        let options = CreateOptions {
            backing_file: Some("one.qcow2".to_owned()),
            backing_fmt: Some("qcow2".to_owned()),
            ..small()
        };
        make(&at("top.qcow2"), &options).unwrap();
        let graph = Graph::new();
        let node = graph.add(&qcow2("d", &at("top.qcow2"), &json!({}))).unwrap();
        for (name, disabled) in [("follows", false), ("rests", true)] {
            let new = block::bitmap::NewBitmap {
                name,
                granularity: Some(4096),
                persistent: true,
                disabled,
            };
            node.add_bitmap(&new).unwrap();
        }
        node.enable_bitmap("rests", true).unwrap();
        write(&node, 9000, 3).unwrap();
        node.enable_bitmap("rests", false).unwrap();
        write(&node, 90_000, 4).unwrap();
        drop(node);
        graph.remove("d").unwrap();
        Self(dir)
    }

    pub(crate) fn copy(&self) -> Copy {
        let dir = tempfile::tempdir().unwrap();
        for name in NAMES {
            std::fs::copy(self.0.path().join(name), dir.path().join(name)).unwrap();
        }
        Copy(dir)
    }
}

/// Images that one try has.
pub(crate) struct Copy(tempfile::TempDir);

impl Copy {
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn check(&self, case: &str) {
        for name in NAMES {
            check_sound(&self.at(name), case);
        }
    }
}
