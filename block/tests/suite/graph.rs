//! Nodes: options, names, backing chains, who may use what, and what QMP is told.

use serde_json::{Value, json};

use block::{Graph, User};

use crate::common::{self, create, have_qemu_img, path};

fn file(image: &std::path::Path) -> Value {
    json!({"driver": "file", "filename": path(image)})
}

fn error_of<T>(result: block::Result<T>) -> String {
    result.err().unwrap().to_string()
}

#[test]
fn names_are_checked_and_unique() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    std::fs::write(&image, [0; 1024]).unwrap();
    let graph = Graph::new();
    let add = |name: &str| {
        graph.add(
            &json!({"driver": "raw", "node-name": name, "read-only": true, "file": file(&image)}),
        )
    };
    add("a").unwrap();
    assert_eq!(error_of(add("a")), "Duplicate nodes with node-name='a'");
    assert_eq!(error_of(add("1a")), "Invalid node-name: '1a'");
    assert_eq!(error_of(add(&"x".repeat(32))), "Node name too long");
    let error = error_of(graph.add(&json!({"driver": "raw", "file": file(&image)})));
    assert_eq!(error, "'node-name' must be specified for the root node");
    let error = error_of(graph.add(&json!({"driver": "raw", "node-name": "b", "file": "none"})));
    assert_eq!(error, "Cannot find device='none' nor node-name='none'");
    let names: Vec<_> = graph.list().iter().map(|n| n.name().to_owned()).collect();
    assert_eq!(names, ["a", "#block000"], "failed additions leave nothing");
}

#[test]
fn a_chain_is_listed_told_and_removed_as_qemu_does() {
    if !have_qemu_img("chain") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("base.raw");
    std::fs::write(&raw, [7; 1 << 20]).unwrap();
    let options = "backing_file=base.raw,backing_fmt=raw";
    let image = create(dir.path(), "a.qcow2", "4M", options);
    let graph = Graph::new();
    let node =
        graph.add(&json!({"driver": "qcow2", "node-name": "d0", "file": file(&image)})).unwrap();
    common::save(&*node.format(), "s1");
    let drivers: Vec<_> = graph.list().iter().map(|n| n.format().driver()).collect();
    assert_eq!(drivers, ["raw", "file", "qcow2", "file"]);
    let info = serde_json::to_value(node.info(false).unwrap()).unwrap();
    assert_eq!(info["drv"], "qcow2");
    assert_eq!(info["file"], path(&image));
    assert_eq!(info["backing_file_depth"], 1);
    assert_eq!(info["backing_file"], path(&raw));
    let told = &info["image"];
    assert_eq!(told["virtual-size"], 4 << 20);
    assert_eq!(told["cluster-size"], 65536);
    assert_eq!(told["backing-filename"], "base.raw");
    assert_eq!(told["full-backing-filename"], path(&raw));
    assert_eq!(told["backing-image"]["format"], "raw");
    assert_eq!(told["format-specific"]["data"]["refcount-bits"], 16);
    assert_eq!(told["snapshots"][0]["name"], "s1");
    assert_eq!(told["snapshots"][0].get("icount"), None);
    let flat = serde_json::to_value(node.info(true).unwrap()).unwrap();
    assert_eq!(flat["image"].get("backing-image"), None);
    let backing = graph.list()[0].name().to_owned();
    let error = error_of(graph.remove(&backing));
    assert_eq!(error, format!("Node '{backing}' is busy: node is used as backing hd of 'd0'"));
    let attached = graph.attach("d0", User::device("virtio0", true, false)).unwrap();
    assert_eq!(error_of(graph.remove("d0")), "Node d0 is in use");
    assert!(
        error_of(graph.attach("d0", User::device("virtio1", true, false)))
            .starts_with("Permission conflict")
    );
    drop(attached);
    graph.remove("d0").unwrap();
    assert!(graph.list().is_empty());
    assert_eq!(error_of(graph.remove("d0")), "Failed to find node with node-name='d0'");
}

#[test]
fn backing_can_be_overridden_by_null_and_by_a_node() {
    if !have_qemu_img("override") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("base.raw");
    std::fs::write(&raw, [7; 1 << 20]).unwrap();
    let other = dir.path().join("other.raw");
    std::fs::write(&other, [8; 1 << 20]).unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "backing_file=base.raw,backing_fmt=raw");
    let graph = Graph::new();
    let options = |name: &str, backing: Value| json!({"driver": "qcow2", "node-name": name, "read-only": true, "backing": backing, "file": file(&image)});
    let node = graph.add(&options("none", Value::Null)).unwrap();
    assert_eq!(common::read(&*node.format(), 0, 1), [0]);
    graph
        .add(&json!({"driver": "raw", "node-name": "o", "read-only": true, "file": file(&other)}))
        .unwrap();
    let node = graph.add(&options("other", json!("o"))).unwrap();
    assert_eq!(common::read(&*node.format(), 0, 1), [8]);
    assert!(node.filename().starts_with("json:{"), "{}", node.filename());
    assert_eq!(
        error_of(graph.remove("o")),
        "Node 'o' is busy: node is used as backing hd of 'other'"
    );
}

#[test]
fn a_chain_that_loops_or_has_a_foreign_protocol_is_refused() {
    if !have_qemu_img("loop") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let a = create(dir.path(), "a.qcow2", "1M", "");
    create(dir.path(), "b.qcow2", "1M", "backing_file=a.qcow2,backing_fmt=qcow2");
    common::qemu_img(&["rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", &path(&a)]);
    let graph = Graph::new();
    let options = json!({"driver": "qcow2", "node-name": "a", "read-only": true, "file": file(&a)});
    assert!(error_of(graph.add(&options)).contains("infinite loop"));
    // A writable one would meet its own lock before its own name.
    let writable = json!({"driver": "qcow2", "node-name": "a", "file": file(&a)});
    assert!(error_of(graph.add(&writable)).contains("a.qcow2' creates an infinite loop."));
    common::qemu_img(&["rebase", "-u", "-b", "nbd://x/y", "-F", "raw", &path(&a)]);
    assert!(error_of(graph.add(&options)).contains("protocol 'nbd'"));
    assert!(graph.list().is_empty());
}

#[test]
fn a_read_only_node_refuses_writes_and_writable_use() {
    if !have_qemu_img("read-only") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let before = std::fs::read(&image).unwrap();
    let graph = Graph::new();
    let node = graph
        .add(&json!({"driver": "qcow2", "node-name": "d", "read-only": true, "file": file(&image)}))
        .unwrap();
    let format = node.format();
    assert!(format.write(0, &[block::WriteBuf::new(&[1])]).is_err());
    assert!(format.discard(0, 512).is_err());
    assert!(format.write_zeroes(0, 512, true).is_err());
    assert!(format.create_snapshot(&common::new_snapshot("x")).is_err());
    assert_eq!(
        error_of(graph.attach("d", User::device("x", true, false))),
        "Block node is read-only"
    );
    graph.attach("d", User::device("x", false, false)).unwrap();
    graph.remove("d").unwrap();
    assert!(std::fs::read(&image).unwrap() == before);
}

#[test]
fn a_raw_node_reads_writes_and_has_no_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    std::fs::write(&image, [7; 1000]).unwrap();
    for direct in [false, true] {
        let graph = Graph::new();
        let node = graph
            .add(&json!({"driver": "raw", "node-name": "r", "cache": {"direct": direct}, "file": file(&image)}))
            .unwrap();
        let format = &*node.format();
        assert_eq!(format.size(), 1024);
        assert_eq!(common::read(format, 990, 34)[..12], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
        common::write(format, 100, &[9; 50]);
        assert_eq!(common::read(format, 99, 3), [7, 9, 9]);
        format.write_zeroes(100, 50, true).unwrap();
        assert_eq!(common::read(format, 99, 3), [7, 0, 0]);
        common::write(format, 100, &[7; 50]);
        assert!(!format.supports_snapshots());
        let error = error_of(format.create_snapshot(&common::new_snapshot("x")));
        assert!(error.contains("raw"), "{error}");
        assert!(format.read(1000, &[block::ReadBuf::new(&mut [0; 100])]).is_err());
    }
}
