//! Nodes that take the places of others in use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use block::graph::Step;
use block::queue::{OwnedBufs, Queue, Request};
use block::{Graph, Link, Perm, Permissions, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, Random, create, have_qemu_img, path};
use crate::graphs::{add, device, picture};

const MIB: u64 = 1 << 20;

fn byte(link: &Link, offset: u64) -> u8 {
    let mut byte = [0xee];
    link.read(offset, &[ReadBuf::new(&mut byte)]).unwrap();
    byte[0]
}

fn put(link: &Link, offset: u64, value: u8) {
    link.write(offset, &[WriteBuf::new(&[value; 512])], false).unwrap();
}

fn error_of<T>(result: block::Result<T>) -> String {
    result.err().unwrap().to_string()
}

#[test]
fn an_overlay_takes_the_place_of_a_disk_in_use() {
    if !have_qemu_img("append") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "4M", "");
    let top = create(dir.path(), "top.qcow2", "4M", "");
    let graph = Graph::new();
    add(&graph, "base", &base, None);
    add(&graph, "top", &top, Some(Value::Null));
    let user = device(&graph, "base");
    let link = user.link();
    put(link, 0, 1);
    graph.append("base", "top").unwrap();
    assert_eq!(link.node().name(), "top");
    assert_eq!(user.node().backing().unwrap().name(), "base");
    assert_eq!(byte(link, 0), 1);
    put(link, 0, 2);
    put(link, 70_000, 3);
    let old = graph.get("base").unwrap();
    assert_eq!(common::read(&*old.format(), 0, 1), [1]);
    assert_eq!(common::read(&*old.format(), 70_000, 1), [0]);
    drop(old);
    let info = serde_json::to_value(user.node().info(false).unwrap()).unwrap();
    assert_eq!(info["backing_file_depth"], 1);
    assert!(info["file"].as_str().unwrap().starts_with("json:"), "the image names no backing file");
    assert_eq!(error_of(graph.remove("top")), "Node top is in use");
    assert_eq!(
        error_of(graph.remove("base")),
        "Node 'base' is busy: node is used as backing hd of 'top'"
    );
    // The guest relies on what is below its disk.
    let error = error_of(graph.attach("base", User::export(true)));
    assert!(
        error.contains("unshared by node 'top' (uses node 'base' as 'backing' child)"),
        "{error}"
    );
    // And back: the base takes the place of the overlay that is over it.
    graph.replace("top", "base").unwrap();
    assert_eq!((byte(link, 0), byte(link, 70_000)), (1, 0));
    graph.remove("top").unwrap();
    drop(user);
    graph.remove("base").unwrap();
    common::check(&base);
    common::check(&top);
}

#[test]
fn overlays_stacked_under_writers_lose_no_write_and_keep_each_point_in_time() {
    if !have_qemu_img("append under load") {
        return;
    }
    const STRIPE: u64 = MIB;
    const WRITERS: u64 = 3;
    const LAYERS: usize = 6;
    let dir = tempfile::tempdir().unwrap();
    let size = format!("{}", WRITERS * STRIPE);
    let graph = Graph::new();
    let image = |n: usize| create(dir.path(), &format!("{n}.qcow2"), &size, "cluster_size=4k");
    add(&graph, "n0", &image(0), None);
    let user = device(&graph, "n0");
    let stop = AtomicBool::new(false);
    let (wrote, writes) = mpsc::channel::<()>();
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let (link, stop, wrote) = (user.link().clone(), &stop, wrote.clone());
                scope.spawn(move || {
                    let mut random = Random(n + 1);
                    let mut model = vec![0; STRIPE as usize];
                    let mut queue = Queue::new(link).unwrap();
                    let mut done = Vec::new();
                    while !stop.load(Ordering::Acquire) {
                        for id in 0..8 {
                            // Apart from each other: what is in flight together has no order.
                            let at = id * (STRIPE / 8) + random.below(100_000);
                            let len = 1 + random.below(9000);
                            let bytes = random.bytes(len);
                            model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                            let bufs = OwnedBufs::from_vec(bytes);
                            queue.submit(Request::write(id, n * STRIPE + at, false, bufs));
                        }
                        queue.drain(&mut done);
                        for completion in done.drain(..) {
                            completion.result.unwrap();
                        }
                        wrote.send(()).unwrap();
                    }
                    model
                })
            })
            .collect();
        for layer in 1..LAYERS {
            for _ in 0..4 {
                writes.recv().unwrap();
            }
            let name = format!("n{layer}");
            add(&graph, &name, &image(layer), Some(Value::Null));
            graph.append(&format!("n{}", layer - 1), &name).unwrap();
            // From here on nothing changes what is below.
            let below = graph.get(&format!("n{}", layer - 1)).unwrap();
            let before = common::read_all(&*below.format());
            for _ in 0..4 {
                writes.recv().unwrap();
            }
            assert_eq!(common::read_all(&*below.format()), before, "layer {layer}");
        }
        stop.store(true, Ordering::Release);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    assert_eq!(user.node().name(), format!("n{}", LAYERS - 1));
    let now = common::read_all(&*user.node().format());
    assert!(now == models.concat(), "a write is lost");
}

#[test]
fn what_cannot_be_replaced_is_refused_and_nothing_changes() {
    if !have_qemu_img("replace refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str| create(dir.path(), name, "1M", "");
    let graph = Graph::new();
    let (base, top, other) = (image("base"), image("top"), image("other"));
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [7; 1 << 20]).unwrap();
    add(&graph, "base", &base, None);
    add(&graph, "top", &top, Some(json!("base")));
    add(&graph, "other", &other, None);
    graph
        .add(&json!({"driver": "raw", "node-name": "ro", "read-only": true,
            "file": {"driver": "file", "node-name": "rofile", "filename": path(&raw)}}))
        .unwrap();
    let user = device(&graph, "top");
    let second = graph.attach("other", User::device("vdb", true, false)).unwrap();
    let before = picture(&graph);
    let backing = |node: &str, backing: &str| {
        graph.change(&[Step::Backing { node: node.to_owned(), backing: Some(backing.to_owned()) }])
    };
    for (result, text) in [
        (graph.replace("top", "zz"), "Cannot find device='zz' nor node-name='zz'"),
        (graph.replace("zz", "top"), "Cannot find device='zz' nor node-name='zz'"),
        (backing("base", "top"), "Making 'top' a backing child of 'base' would create a cycle"),
        (backing("top", "top"), "Making 'top' a backing child of 'top' would create a cycle"),
        (backing("ro", "base"), "Driver 'raw' of node 'ro' does not support backing files"),
        (graph.replace("top", "ro"), "Block node is read-only"),
        (
            graph.replace("rofile", "other"),
            "Node 'rofile' cannot be replaced: node 'ro' keeps its bytes in it",
        ),
    ] {
        assert_eq!(error_of(result), text);
        assert_eq!(picture(&graph), before, "{text}");
    }
    let error = error_of(graph.replace("top", "other"));
    assert!(
        error.starts_with("Permission conflict on node 'other': permissions 'write'"),
        "{error}"
    );
    // A step that could be made is not, if a later one cannot.
    let steps = [
        Step::Backing { node: "other".to_owned(), backing: Some("base".to_owned()) },
        Step::Replace { from: "top".to_owned(), to: "ro".to_owned() },
    ];
    assert_eq!(error_of(graph.change(&steps)), "Block node is read-only");
    assert_eq!(picture(&graph), before);
    assert_eq!((user.node().name(), second.node().name()), ("top", "other"));
}

#[test]
fn a_job_stays_at_its_node_and_makes_room_for_the_guest() {
    if !have_qemu_img("pivot") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    add(&graph, "source", &create(dir.path(), "a", "1M", ""), None);
    add(&graph, "target", &create(dir.path(), "b", "1M", ""), None);
    let guest = device(&graph, "source");
    let job = graph.attach("source", User::unnamed(Perm::CONSISTENT_READ, Perm::all())).unwrap();
    let alone = Perm::WRITE_UNCHANGED;
    let target = graph.attach("target", User::unnamed(Perm::WRITE, alone)).unwrap();
    let error = error_of(graph.replace("source", "target"));
    assert!(error.starts_with("Permission conflict on node 'target'"), "{error}");
    target.set_permissions(Permissions { used: Perm::empty(), shared: Perm::all() }).unwrap();
    graph.replace("source", "target").unwrap();
    assert_eq!(guest.node().name(), "target");
    assert_eq!((job.node().name(), target.node().name()), ("source", "target"));
    put(guest.link(), 0, 5);
    let error = error_of(target.set_permissions(Permissions { used: Perm::WRITE, shared: alone }));
    assert!(error.starts_with("Permission conflict on node 'target'"), "{error}");
}

#[test]
fn bitmaps_stay_with_their_node() {
    if !have_qemu_img("bitmaps of replaced nodes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    let base = add(&graph, "base", &create(dir.path(), "a", "1M", ""), None);
    let top = add(&graph, "top", &create(dir.path(), "b", "1M", ""), Some(Value::Null));
    let guest = device(&graph, "base");
    base.add_bitmap(&block::bitmap::NewBitmap { name: "m", ..Default::default() }).unwrap();
    put(guest.link(), 0, 1);
    graph.append("base", "top").unwrap();
    put(guest.link(), 500_000, 1);
    assert_eq!(base.bitmaps().infos()[0].count, 65536, "the write to the overlay is not its own");
    assert!(top.bitmaps().infos().is_empty());
}

#[test]
fn held_requests_wait_over_several_changes_and_go_to_the_last_node() {
    if !have_qemu_img("hold") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    let image = |name: &str| create(dir.path(), name, "1M", "");
    add(&graph, "n0", &image("0"), None);
    let guest = device(&graph, "n0");
    let held = graph.hold_all();
    add(&graph, "n1", &image("1"), Some(Value::Null));
    graph.append("n0", "n1").unwrap();
    assert!(guest.link().try_enter().is_none(), "a node that was made meanwhile lets requests in");
    add(&graph, "n2", &image("2"), Some(Value::Null));
    let (told, tells) = mpsc::channel();
    let writer = {
        let link = guest.link().clone();
        thread::spawn(move || {
            put(&link, 0, 9);
            told.send(()).unwrap();
        })
    };
    graph.append("n1", "n2").unwrap();
    assert!(tells.try_recv().is_err());
    drop(held);
    writer.join().unwrap();
    let first = |name: &str| common::read(&*graph.get(name).unwrap().format(), 0, 1)[0];
    assert_eq!((first("n0"), first("n1"), first("n2")), (0, 0, 9));
    // Holding nodes holds what is above them, and nothing beside them.
    add(&graph, "x", &image("x"), None);
    let beside = graph.attach("x", User::device("vdb", true, false)).unwrap();
    let held = graph.hold(&["n0"]).unwrap();
    assert!(guest.link().try_enter().is_none());
    assert!(beside.link().try_enter().is_some());
    drop(held);
    assert!(guest.link().try_enter().is_some());
    assert_eq!(error_of(graph.hold(&["zz"])), "Cannot find device='zz' nor node-name='zz'");
}

#[test]
fn nodes_made_for_others_go_when_nobody_uses_them_any_more() {
    if !have_qemu_img("orphans") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    let base = create(dir.path(), "base", "1M", "");
    let named = format!("backing_file={},backing_fmt=qcow2", path(&base));
    let top = create(dir.path(), "top", "1M", &named);
    add(&graph, "top", &top, None);
    let below = graph.get("top").unwrap().backing().unwrap().name().to_owned();
    graph.change(&[Step::Backing { node: "top".to_owned(), backing: None }]).unwrap();
    assert!(graph.get(&below).is_none());
    assert_eq!(graph.list().len(), 2);
    // Nobody holds the image below any more.
    common::qemu_io(&base, &["write 0 512"]);
}
