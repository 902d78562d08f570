//! External snapshots: overlays over disks in use.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use block::graph::{ExternalSnapshot, Overlay};
use block::{Attachment, Graph, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, Random, create, have_qemu_img, path, qemu_img};
use crate::graphs::{add, device, picture};

const MIB: usize = 1 << 20;

fn file(image: &Path, node_name: &str) -> Overlay {
    Overlay::File {
        filename: path(image),
        node_name: Some(node_name.to_owned()),
        format: None,
        existing: false,
    }
}

fn snapshot(graph: &Graph, node: &str, overlay: &Overlay) {
    let mut snapshot = ExternalSnapshot::prepare(graph, node, overlay).unwrap();
    snapshot.commit().unwrap();
    snapshot.finish();
}

fn refusal(graph: &Graph, node: &str, overlay: &Overlay) -> String {
    ExternalSnapshot::prepare(graph, node, overlay).err().unwrap().to_string()
}

fn put(user: &Attachment, offset: u64, bytes: &[u8]) {
    user.link().write(offset, &[WriteBuf::new(bytes)], false).unwrap();
}

fn get(user: &Attachment, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    user.link().read(offset, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

/// Both programs find the same disk in a chain that nobody has open, and nothing wrong with it.
fn closed_chain_is(dir: &Path, top: &Path, images: &[&Path], expected: &[u8]) {
    for image in images {
        common::check(image);
    }
    assert!(common::qemu_contents(dir, top, None) == expected, "QEMU sees something else");
    let (_graph, node) = common::open(top);
    assert!(common::read_all(&*node.format()) == expected, "a new opening sees something else");
}

fn chain_length(top: &Path) -> usize {
    let chain = qemu_img(&["info", "-U", "--backing-chain", "--output", "json", &path(top)]);
    serde_json::from_str::<Vec<Value>>(&chain).unwrap().len()
}

#[test]
fn snapshots_of_a_disk_under_writes_keep_each_moment_and_a_chain_that_qemu_reads() {
    if !have_qemu_img("external snapshots under load") {
        return;
    }
    const SIZE: usize = 3 * MIB;
    let dir = tempfile::tempdir().unwrap();
    let image = |n: usize| dir.path().join(format!("{n}.qcow2"));
    create(dir.path(), "0.qcow2", &SIZE.to_string(), "cluster_size=4k");
    let graph = Graph::new();
    add(&graph, "n0", &image(0), None);
    let user = device(&graph, "n0");
    let stop = AtomicBool::new(false);
    let (wrote, writes) = mpsc::channel::<()>();
    let model = thread::scope(|scope| {
        let writer = {
            let (link, stop) = (user.link().clone(), &stop);
            scope.spawn(move || {
                let (mut random, mut model) = (Random(7), vec![0; SIZE]);
                while !stop.load(Ordering::Acquire) {
                    let len = 1 + random.below(20_000) as usize;
                    let at = random.below((SIZE - len) as u64) as usize;
                    let bytes = random.bytes(len as u64);
                    if random.below(4) == 0 {
                        model[at..at + len].fill(0);
                        link.write_zeroes(at as u64, len as u64, true, false).unwrap();
                    } else {
                        model[at..at + len].copy_from_slice(&bytes);
                        link.write(at as u64, &[WriteBuf::new(&bytes)], false).unwrap();
                    }
                    wrote.send(()).unwrap();
                }
                model
            })
        };
        for layer in 1..5 {
            (0..30).for_each(|_| writes.recv().unwrap());
            let below = format!("n{}", layer - 1);
            snapshot(&graph, &below, &file(&image(layer), &format!("n{layer}")));
            let below = graph.get(&below).unwrap();
            assert!(below.read_only(), "what is below an overlay takes no writes any more");
            let before = common::read_all(&*below.format());
            (0..30).for_each(|_| writes.recv().unwrap());
            assert!(common::read_all(&*below.format()) == before, "layer {layer}");
        }
        stop.store(true, Ordering::Release);
        writer.join().unwrap()
    });
    assert_eq!(user.node().name(), "n4");
    assert!(get(&user, 0, SIZE) == model);
    let info = serde_json::to_value(user.node().info(false).unwrap()).unwrap();
    assert_eq!(info["file"], path(&image(4)));
    assert_eq!(info["backing_file_depth"], 4);
    assert_eq!(info["image"]["full-backing-filename"], path(&image(3)));
    assert_eq!(info["image"]["backing-filename-format"], "qcow2");
    assert_eq!(
        graph.remove("n4").unwrap_err().to_string(),
        "Node n4 is in use",
        "overlays belong to their users"
    );
    drop(user);
    assert!(graph.get("n4").is_none() && graph.get("n0").is_some());
    graph.remove("n0").unwrap();
    assert!(graph.list().is_empty());
    let images: Vec<_> = (0..5).map(image).collect();
    let images: Vec<&Path> = images.iter().map(|image| image.as_path()).collect();
    closed_chain_is(dir.path(), images[4], &images, &model);
    assert_eq!(chain_length(images[4]), 5);
}

#[test]
fn refusals_have_the_texts_of_qemu_and_change_nothing() {
    if !have_qemu_img("external snapshot refusals") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let base = create(dir.path(), "base.qcow2", "1M", "");
    let graph = Graph::new();
    add(&graph, "d", &base, None);
    let user = device(&graph, "d");
    add(&graph, "o", &create(dir.path(), "o.qcow2", "1M", ""), Some(Value::Null));
    let other = graph.attach("o", User::device("vdb", true, false)).unwrap();
    let plain = at("plain");
    std::fs::write(&plain, [0; 4096]).unwrap();
    graph
        .add(&json!({"driver": "raw", "node-name": "r",
            "file": {"driver": "file", "filename": path(&plain)}}))
        .unwrap();
    let over = create(
        dir.path(),
        "over.qcow2",
        "1M",
        &format!("backing_file={},backing_fmt=qcow2", path(&base)),
    );
    add(&graph, "over", &over, Some(json!("r")));
    let before = picture(&graph);
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    let files_before = files();
    let with = |filename: String, format: &str, existing| Overlay::File {
        filename,
        node_name: Some("n".to_owned()),
        format: Some(format.to_owned()),
        existing,
    };
    let node = |name: &str| Overlay::Node(name.to_owned());
    let nowhere = format!("{}/no/file", path(dir.path()));
    for (of, overlay, text) in [
        ("zz", node("o"), "Cannot find device='zz' nor node-name='zz'".to_owned()),
        ("d", node("zz"), "Cannot find device='zz' nor node-name='zz'".to_owned()),
        ("d", node("o"), "The overlay is already in use".to_owned()),
        ("d", node("d"), "The overlay is already in use".to_owned()),
        ("d", node("over"), "The overlay already has a backing image".to_owned()),
        ("r", node("o"), "Node 'r' is busy: node is used as backing hd of 'over'".to_owned()),
        ("d", file(&at("x"), "o"), "New overlay node-name already in use".to_owned()),
        ("d", file(&at("x"), "1n"), "Invalid node-name: '1n'".to_owned()),
        (
            "d",
            with(path(&at("x")), "raw", false),
            "Backing file not supported for file format 'raw'".to_owned(),
        ),
        ("d", with(path(&at("x")), "xyz", false), "Unknown file format 'xyz'".to_owned()),
        (
            "d",
            with(nowhere.clone(), "qcow2", false),
            format!("Could not create '{nowhere}': No such file or directory"),
        ),
        (
            "d",
            with(path(&base), "qcow2", false),
            "Error: Trying to create an image with the same filename as the backing file"
                .to_owned(),
        ),
        ("d", with("foo:x".to_owned(), "qcow2", false), "Unknown protocol 'foo'".to_owned()),
        (
            "d",
            with(nowhere.clone(), "qcow2", true),
            format!("Could not open '{nowhere}': No such file or directory"),
        ),
    ] {
        let told = refusal(&graph, of, &overlay);
        assert_eq!(told, text);
        assert_eq!(picture(&graph), before, "{text}");
        assert_eq!(files(), files_before, "{text}");
    }
    let told = refusal(&graph, "d", &with(path(&at("none")), "raw", true));
    assert!(told.starts_with("Could not open"), "{told}");
    std::fs::write(at("raw"), [0; 4096]).unwrap();
    let told = refusal(&graph, "d", &with(path(&at("raw")), "raw", true));
    assert_eq!(told, "The overlay does not support backing images");
    let told = refusal(&graph, "d", &with(path(&at("raw")), "qcow2", true));
    assert!(told.starts_with("Image is not in qcow2 format"), "{told}");
    let claim = graph.claim(&["d"], "backup").unwrap();
    let busy = "Node 'd' is busy: block device is in use by block job: backup";
    assert_eq!(refusal(&graph, "d", &file(&at("x"), "n")), busy);
    assert_eq!(graph.claim(&["o", "d"], "mirror").err().unwrap().to_string(), busy);
    assert_eq!(graph.resize("d", 512).unwrap_err().to_string(), busy);
    drop(claim);
    drop(graph.claim(&["o", "d"], "mirror").unwrap());
    assert_eq!(picture(&graph), before);
    assert_eq!((user.node().name(), other.node().name()), ("d", "o"));
}

#[test]
fn an_aborted_snapshot_leaves_everything_as_it_was_before_and_after_its_commit() {
    if !have_qemu_img("external snapshot abort") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "1M", "");
    let (made, there) = (dir.path().join("made"), create(dir.path(), "there", "1M", ""));
    let graph = Graph::new();
    add(&graph, "d", &base, None);
    let user = device(&graph, "d");
    put(&user, 0, b"still written");
    user.node().flush().unwrap();
    let before = picture(&graph);
    let existing = Overlay::File {
        filename: path(&there),
        node_name: Some("n".to_owned()),
        format: None,
        existing: true,
    };
    for overlay in [file(&made, "n"), existing] {
        for committed in [false, true] {
            // What happens within a transaction: requests wait.
            let held = graph.hold_all();
            let mut snapshot = ExternalSnapshot::prepare(&graph, "d", &overlay).unwrap();
            assert_eq!(snapshot.overlay(), "n");
            if committed {
                snapshot.commit().unwrap();
                assert_eq!(user.node().name(), "n");
                snapshot.abort();
            } else {
                drop(snapshot);
            }
            drop(held);
            assert_eq!(picture(&graph), before);
            assert_eq!(user.node().name(), "d");
            assert!(!made.exists() && there.exists());
            put(&user, 0, b"still written");
            assert_eq!(get(&user, 0, 13), b"still written");
        }
    }
}

#[test]
fn several_disks_are_snapshotted_at_one_moment() {
    if !have_qemu_img("group of external snapshots") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    let users: Vec<_> = (0..3)
        .map(|n| {
            let name = format!("d{n}");
            add(&graph, &name, &create(dir.path(), &name, "1M", ""), None);
            device(&graph, &name)
        })
        .collect();
    let stop = AtomicBool::new(false);
    let (told, tells) = mpsc::channel();
    thread::scope(|scope| {
        // The disks have the same counter, the first before the second before the third.
        scope.spawn(|| {
            let mut count: u64 = 0;
            while !stop.load(Ordering::Acquire) {
                count += 1;
                for user in &users {
                    put(user, 4096, &count.to_le_bytes());
                }
                told.send(()).unwrap();
            }
        });
        for round in 0..8 {
            (0..20).for_each(|_| tells.recv().unwrap());
            let overlay =
                |n: usize| file(&dir.path().join(format!("{round}-{n}")), &format!("o{round}-{n}"));
            let nodes: Vec<String> = users.iter().map(|u| u.node().name().to_owned()).collect();
            let mut all: Vec<_> = (nodes.iter().enumerate())
                .map(|(n, node)| ExternalSnapshot::prepare(&graph, node, &overlay(n)).unwrap())
                .collect();
            let held = graph.hold_all();
            all.iter_mut().for_each(|snapshot| snapshot.commit().unwrap());
            drop(held);
            all.into_iter().for_each(ExternalSnapshot::finish);
            let counts: Vec<u64> = (nodes.iter())
                .map(|node| {
                    let node = graph.get(node).unwrap();
                    u64::from_le_bytes(common::read(&*node.format(), 4096, 8).try_into().unwrap())
                })
                .collect();
            assert!(counts[0] >= counts[1] && counts[1] >= counts[2], "{counts:?}");
            assert!(counts[0] - counts[2] <= 1, "not one moment: {counts:?}");
        }
        stop.store(true, Ordering::Release);
    });
}

#[test]
fn an_overlay_of_a_node_without_users_is_made_and_its_node_vanishes() {
    if !have_qemu_img("external snapshot without users") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "1M", "");
    let graph = Graph::new();
    add(&graph, "d", &base, None);
    let made = dir.path().join("made");
    snapshot(&graph, "d", &file(&made, "n"));
    assert!(graph.get("n").is_none());
    assert!(graph.get("d").unwrap().read_only());
    graph.remove("d").unwrap();
    closed_chain_is(dir.path(), &made, &[&base, &made], &vec![0; MIB]);
    assert_eq!(chain_length(&made), 2);
}

#[test]
fn an_overlay_that_names_no_backing_file_is_found_below_the_next_one_all_the_same() {
    if !have_qemu_img("json names") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "1M", "");
    let nameless = create(dir.path(), "nameless.qcow2", "1M", "");
    let top = dir.path().join("top.qcow2");
    let graph = Graph::new();
    add(&graph, "d", &base, None);
    add(&graph, "o", &nameless, None);
    let user = device(&graph, "d");
    put(&user, 0, &[1; 512]);
    snapshot(&graph, "d", &Overlay::Node("o".to_owned()));
    put(&user, 100_000, &[2; 512]);
    snapshot(&graph, "o", &file(&top, "top"));
    put(&user, 200_000, &[3; 512]);
    let expected = get(&user, 0, MIB);
    let info = serde_json::to_value(user.node().info(true).unwrap()).unwrap();
    assert!(info["image"]["backing-filename"].as_str().unwrap().starts_with("json:"), "{info}");
    assert_eq!(info["file"], path(&top));
    assert_eq!((expected[0], expected[100_000], expected[200_000]), (1, 2, 3));
    drop(user);
    graph.remove("o").unwrap();
    graph.remove("d").unwrap();
    closed_chain_is(dir.path(), &top, &[&base, &nameless, &top], &expected);
}
