//! Two users of the same images, of which one at a time may write: what a migration does.

use std::path::Path;

use block::{Graph, Node, ReadBuf, User, WriteBuf};
use serde_json::json;

use crate::common::{self, create, have_qemu_img, path, qemu_img};

/// A chain of qcow2 images and a raw disk, with a guest's disks on both.
struct Machine {
    graph: Graph,
    _users: Vec<block::graph::Attachment>,
}

impl Machine {
    fn start(dir: &Path, incoming: bool) -> Self {
        let graph = Graph::new();
        if incoming {
            graph.open_inactive();
        }
        let file = |name: &str| json!({"driver": "file", "filename": path(&dir.join(name))});
        let f = json!({"driver": "file", "node-name": "f", "filename": path(&dir.join("r.raw"))});
        graph.add(&f).unwrap();
        graph.add(&json!({"driver": "raw", "node-name": "r", "file": "f"})).unwrap();
        graph
            .add(&json!({"driver": "qcow2", "node-name": "d", "file": file("top.qcow2")}))
            .unwrap();
        let users = ["d", "r"].map(|node| {
            graph.attach(node, User::device(&format!("v{node}"), true, false)).unwrap()
        });
        Self { graph, _users: users.into() }
    }

    fn node(&self, name: &str) -> std::sync::Arc<Node> {
        self.graph.get(name).unwrap()
    }

    fn write(&self, byte: u8) -> block::Result<()> {
        self.node("d").write(100_000, &[WriteBuf::new(&[byte; 512])])?;
        self.node("r").write(512, &[WriteBuf::new(&[byte; 512])])
    }

    fn bytes(&self) -> [u8; 2] {
        [("d", 100_000), ("r", 512)].map(|(name, offset)| {
            let mut byte = [0xee];
            self.node(name).read(offset, &[ReadBuf::new(&mut byte)]).unwrap();
            byte[0]
        })
    }
}

fn images(dir: &Path) {
    create(dir, "base.qcow2", "4M", "");
    create(dir, "top.qcow2", "4M", "backing_file=base.qcow2,backing_fmt=qcow2");
    qemu_img(&["snapshot", "-c", "s", &path(&dir.join("top.qcow2"))]);
    std::fs::write(dir.join("r.raw"), vec![0; 1 << 20]).unwrap();
}

#[test]
fn the_one_who_is_active_writes_and_the_other_finds_it_when_it_becomes_active() {
    if !have_qemu_img("activity") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let (a, b) = (Machine::start(dir.path(), false), Machine::start(dir.path(), true));
    a.write(1).unwrap();
    assert!(b.graph.has_inactive() && !a.graph.has_inactive());
    assert!(b.node("d").is_inactive() && !b.node("d").read_only());
    b.write(9).unwrap_err();
    let error = b.graph.activate().unwrap_err().to_string();
    assert!(error.contains("Failed to get") && error.contains("lock"), "{error}");
    assert!(b.graph.has_inactive());
    let (mut from, mut to) = (&a, &b);
    for byte in 2..6 {
        from.write(byte).unwrap();
        from.graph.inactivate().unwrap();
        from.write(9).unwrap_err();
        assert_eq!(from.bytes(), [byte; 2]);
        // A third one may look at it, too.
        common::check(&dir.path().join("top.qcow2"));
        to.graph.activate().unwrap();
        assert_eq!(to.bytes(), [byte; 2]);
        assert!(from.graph.activate().is_err());
        (from, to) = (to, from);
    }
    from.write(6).unwrap();
    // The one without locks ends first, and writes nothing.
    to.graph.close_images().unwrap();
    from.graph.close_images().unwrap();
    assert_eq!(from.bytes(), [6; 2]);
    drop((a, b));
    common::check(&dir.path().join("top.qcow2"));
}

#[test]
fn what_is_opened_after_the_activation_is_active() {
    if !have_qemu_img("activity of new nodes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let machine = Machine::start(dir.path(), true);
    let options = |name: &str, file: &str| json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path(&create(dir.path(), file, "1M", ""))}});
    let before = machine.graph.add(&options("n", "n.qcow2")).unwrap();
    machine.graph.activate().unwrap();
    let after = machine.graph.add(&options("m", "m.qcow2")).unwrap();
    for node in [before, after] {
        node.write(0, &[WriteBuf::new(&[1; 512])]).unwrap();
    }
    machine.graph.activate().unwrap();
}

#[test]
fn a_disk_that_others_write_to_stays_active() {
    if !have_qemu_img("activity with an export") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let machine = Machine::start(dir.path(), false);
    let refused = |machine: &Machine, words: &str| {
        let error = machine.graph.inactivate().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        machine.write(3).unwrap();
    };
    let options = json!({"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": path(&create(dir.path(), "x.qcow2", "1M", ""))}});
    machine.graph.add(&options).unwrap();
    let export = machine.graph.attach_export("x", true).unwrap();
    refused(&machine, "Node 'x' is busy");
    drop(export);
    let claim = machine.graph.claim(&["r"], "mirror").unwrap();
    refused(&machine, "Node 'r' is busy");
    drop(claim);
    let reading = machine.graph.attach_export("x", false).unwrap();
    machine.graph.inactivate().unwrap();
    machine.write(4).unwrap_err();
    drop(reading);
    machine.graph.activate().unwrap();
    machine.write(4).unwrap();
}
