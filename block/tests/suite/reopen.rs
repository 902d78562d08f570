//! blockdev-reopen: what changes, what is refused, and that a refusal changes nothing.

use block::queue::{AlignedBuf, OwnedBufs, Queue, Request};
use block::{Graph, Node, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, create, have_qemu_img, path};

fn file(path: &std::path::Path) -> Value {
    json!({"driver": "file", "filename": common::path(path)})
}

fn error_of<T>(result: block::Result<T>) -> String {
    match result {
        Err(error) => error.to_string(),
        Ok(_) => panic!("an error was expected"),
    }
}

fn byte(node: &Node, offset: u64) -> u8 {
    let mut byte = [0xee];
    node.read(offset, &[ReadBuf::new(&mut byte)]).unwrap();
    byte[0]
}

/// Name, read-only, filename of all nodes; what a failed reopen must leave alone.
fn picture(graph: &Graph) -> Vec<String> {
    let of =
        |node: &std::sync::Arc<Node>| serde_json::to_string(&node.info(true).unwrap()).unwrap();
    graph.list().iter().map(of).collect()
}

#[test]
fn a_node_goes_from_read_only_to_writable_and_back() {
    if !have_qemu_img("reopen") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    let graph = Graph::new();
    let options = |read_only: bool| json!({"driver": "qcow2", "node-name": "d", "read-only": read_only, "file": file(&image)});
    let node = graph.add(&options(true)).unwrap();
    assert!(node.write(0, &[WriteBuf::new(&[1])]).is_err());
    graph.reopen(&[options(false)]).unwrap();
    assert!(!node.read_only());
    node.write(70_000, &[WriteBuf::new(&[7; 4096])]).unwrap();
    let user = graph.attach("d", User::device("vda", true, false)).unwrap();
    let before = picture(&graph);
    assert_eq!(
        error_of(graph.reopen(&[options(true)])),
        "Read-only block node 'd' cannot support read-write users"
    );
    assert_eq!(picture(&graph), before);
    drop(user);
    graph.reopen(&[options(true)]).unwrap();
    assert_eq!(byte(&node, 70_000), 7);
    assert!(node.write(0, &[WriteBuf::new(&[1])]).is_err());
    // Not written back: another process may read the image now.
    common::check(&image);
    graph.remove("d").unwrap();
    common::check(&image);
}

#[test]
fn the_backing_file_can_be_taken_away_replaced_and_put_back() {
    if !have_qemu_img("reopen backing") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("one.raw", 1), ("two.raw", 2)] {
        std::fs::write(dir.path().join(name), vec![content; 1 << 20]).unwrap();
    }
    let image = create(dir.path(), "a.qcow2", "1M", "backing_file=one.raw,backing_fmt=raw");
    let graph = Graph::new();
    let with = |backing: Value| json!({"driver": "qcow2", "node-name": "d", "file": file(&image), "backing": backing});
    let plain = json!({"driver": "qcow2", "node-name": "d", "file": file(&image)});
    let node = graph.add(&plain).unwrap();
    assert_eq!(byte(&node, 0), 1);
    assert_eq!(error_of(graph.reopen(std::slice::from_ref(&plain))), "backing is missing for 'd'");
    graph.reopen(&[with(Value::Null)]).unwrap();
    assert_eq!(byte(&node, 0), 0);
    graph
        .add(&json!({"driver": "raw", "node-name": "two", "read-only": true, "file": file(&dir.path().join("two.raw"))}))
        .unwrap();
    graph.reopen(&[with(json!("two"))]).unwrap();
    assert_eq!(byte(&node, 0), 2);
    assert_eq!(
        error_of(graph.remove("two")),
        "Node 'two' is busy: node is used as backing hd of 'd'"
    );
    assert_eq!(
        error_of(graph.reopen(&[with(json!("d"))])),
        "Making 'd' a backing child of 'd' would create a cycle"
    );
    assert_eq!(
        error_of(graph.reopen(&[with(file(&image))])),
        "Cannot change the option 'backing.driver'"
    );
    assert_eq!(
        error_of(graph.reopen(&[with(json!("zz"))])),
        "Cannot find device='' nor node-name='zz'"
    );
    node.write(0, &[WriteBuf::new(&[9; 512])]).unwrap();
    graph.reopen(&[with(Value::Null)]).unwrap();
    assert_eq!((byte(&node, 0), byte(&node, 65536)), (9, 0));
    graph.remove("two").unwrap();
}

#[test]
fn a_list_is_reopened_as_a_whole_or_not_at_all() {
    if !have_qemu_img("reopen list") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (create(dir.path(), "a.qcow2", "1M", ""), create(dir.path(), "b.qcow2", "1M", ""));
    let graph = Graph::new();
    let f = |read_only: bool| json!({"driver": "file", "node-name": "f", "filename": path(&a), "read-only": read_only});
    let d = |read_only: bool| json!({"driver": "qcow2", "node-name": "d", "file": "f", "read-only": read_only});
    let e = |read_only: bool| json!({"driver": "qcow2", "node-name": "e", "file": file(&b), "read-only": read_only});
    graph.add(&f(true)).unwrap();
    let node = graph.add(&d(true)).unwrap();
    graph.add(&e(false)).unwrap();
    let before = picture(&graph);
    assert_eq!(error_of(graph.reopen(&[e(true), d(false)])), "Block node is read-only");
    let mut bad = e(true);
    bad["file"]["filename"] = json!(path(&a));
    assert_eq!(
        error_of(graph.reopen(&[f(false), d(false), bad])),
        "Cannot change the option 'filename'"
    );
    assert_eq!(picture(&graph), before);
    graph.reopen(&[f(false), d(false), e(true)]).unwrap();
    node.write(0, &[WriteBuf::new(&[3; 512])]).unwrap();
    assert_eq!(
        error_of(graph.reopen(&[f(true)])),
        "Read-only block node 'f' cannot support read-write users"
    );
    graph.reopen(&[d(true), f(true)]).unwrap();
    assert_eq!(byte(&node, 0), 3);
    for (options, text) in [
        (json!({"driver": "qcow2", "file": "f"}), "node-name not specified"),
        (
            json!({"driver": "qcow2", "node-name": "zz", "file": "f"}),
            "Failed to find node with node-name='zz'",
        ),
        (
            json!({"driver": "raw", "node-name": "d", "file": "f"}),
            "Cannot change the option 'driver'",
        ),
        (json!({"node-name": "d", "file": "f"}), "Parameter 'options[0].driver' is missing"),
        (json!({"driver": "qcow2", "node-name": "d"}), "Parameter 'options[0].file' is missing"),
        (
            json!({"driver": "qcow2", "node-name": "d", "read-only": true, "force-share": true, "file": "f"}),
            "Cannot change the option 'force-share'",
        ),
    ] {
        assert_eq!(error_of(graph.reopen(&[options])), text);
    }
}

#[test]
fn what_an_entry_does_not_say_goes_back_to_its_default() {
    if !have_qemu_img("reopen defaults") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let graph = Graph::new();
    let options = |more: Value| {
        let mut all = json!({"driver": "qcow2", "node-name": "d", "file": file(&image)});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let node = graph.add(&options(json!({}))).unwrap();
    let more = json!({"discard": "unmap", "detect-zeroes": "unmap", "cache": {"no-flush": true, "direct": true}});
    graph.reopen(&[options(more)]).unwrap();
    let info = serde_json::to_value(node.info(true).unwrap()).unwrap();
    assert_eq!(info["detect_zeroes"], "unmap");
    assert_eq!(info["cache"], json!({"writeback": true, "direct": true, "no-flush": true}));
    node.write(0, &[WriteBuf::new(&[5; 65536])]).unwrap();
    node.write(0, &[WriteBuf::new(&[0; 65536])]).unwrap();
    assert_eq!(byte(&node, 5), 0);
    graph.reopen(&[options(json!({}))]).unwrap();
    let info = serde_json::to_value(node.info(true).unwrap()).unwrap();
    assert_eq!(info["detect_zeroes"], "off");
    assert_eq!(info["cache"], json!({"writeback": true, "direct": false, "no-flush": false}));
    graph.remove("d").unwrap();
    drop(node);
    let map = common::qemu_img(&["map", "--output=json", &path(&image)]);
    assert!(!map.contains("\"data\": true"), "zeroes that were detected take space: {map}");
}

#[test]
fn requests_go_on_while_their_node_is_reopened_again_and_again() {
    if !have_qemu_img("reopen under load") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "base.qcow2", "8M", "");
    let image = create(dir.path(), "a.qcow2", "8M", "backing_file=base.qcow2,backing_fmt=qcow2");
    let graph = Graph::new();
    let base = json!({"driver": "qcow2", "node-name": "b", "read-only": true, "file": file(&dir.path().join("base.qcow2"))});
    let top = json!({"driver": "qcow2", "node-name": "d", "file": file(&image), "backing": "b"});
    graph.add(&base).unwrap();
    let node = graph.add(&top).unwrap();
    let done = &std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in 0..3u64 {
            let node = &node;
            scope.spawn(move || {
                let mut random = common::Random(lane + 1);
                let mut value = 0u8;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    value = value.wrapping_add(1);
                    let offset = lane * (2 << 20) + random.below((2 << 20) - 4096);
                    node.write(offset, &[WriteBuf::new(&[value; 4096])]).unwrap();
                    assert_eq!(byte(node, offset + 4095), value);
                }
            });
        }
        for round in 0..60 {
            let list =
                if round % 2 == 0 { vec![top.clone()] } else { vec![base.clone(), top.clone()] };
            graph.reopen(&list).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    graph.remove("d").unwrap();
    drop(node);
    common::check(&image);
}

/// The owner of a queue has reads of the backing file in flight when it asks how it is stored: it
/// must not come to wait for a reopen that waits for these.
#[test]
fn a_backing_file_is_reopened_alone_under_reads_and_status_of_its_overlay() {
    if !have_qemu_img("reopen of a backing file under load") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base_image = create(dir.path(), "base.qcow2", "8M", "preallocation=full");
    let contents = common::Random(3).bytes(8 << 20);
    {
        let (_graph, node) = common::open(&base_image);
        node.write(0, &[WriteBuf::new(&contents)]).unwrap();
    }
    let image = create(dir.path(), "a.qcow2", "8M", "backing_file=base.qcow2,backing_fmt=qcow2");
    let graph = Graph::new();
    let base = json!({"driver": "qcow2", "node-name": "b", "read-only": true, "cache": {"direct": true}, "file": file(&base_image)});
    let top = json!({"driver": "qcow2", "node-name": "d", "file": file(&image), "backing": "b"});
    graph.add(&base).unwrap();
    let node = graph.add(&top).unwrap();
    let done = &std::sync::atomic::AtomicBool::new(false);
    let rounds = &std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for lane in 0..2u64 {
            let (node, contents) = (&node, &contents);
            scope.spawn(move || {
                let mut random = common::Random(lane + 1);
                let mut queue = Queue::new(node.clone()).unwrap();
                let mut completions = Vec::new();
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    for _ in 0..8 {
                        let offset = random.below(2048) * 4096;
                        let bufs = OwnedBufs::from_aligned(AlignedBuf::new(4096));
                        queue.submit(Request::read(offset, offset, bufs));
                    }
                    queue.kick();
                    if let Some(access) = node.try_access() {
                        let status = access.block_status(0, 8 << 20).unwrap();
                        assert!(status.iter().all(|e| e.data && e.depth == 2), "{status:?}");
                    }
                    queue.drain(&mut completions);
                    rounds.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    for completion in completions.drain(..) {
                        completion.result.unwrap();
                        let at = completion.id as usize;
                        assert!(completion.bufs.as_slice().unwrap() == &contents[at..at + 4096]);
                    }
                }
            });
        }
        let reopened = (0..100).try_for_each(|_| {
            // Until its tables are in memory again, so that reads are located.
            let seen = rounds.load(std::sync::atomic::Ordering::Relaxed);
            while rounds.load(std::sync::atomic::Ordering::Relaxed) < seen + 8 {
                std::thread::yield_now();
            }
            graph.reopen(std::slice::from_ref(&base))
        });
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reopened.unwrap();
    });
}

#[test]
fn a_node_with_a_snapshot_change_under_way_is_not_reopened() {
    if !have_qemu_img("reopen busy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let (graph, node) = common::open(&image);
    let options = json!({"driver": "qcow2", "node-name": "d", "file": file(&image)});
    let format = node.format();
    let mut change = format.create_snapshot(&common::new_snapshot("s")).unwrap();
    let error = error_of(graph.reopen(std::slice::from_ref(&options)));
    assert_eq!(error, "Node 'd' is busy: a job is working on it");
    common::land(&mut *change).unwrap();
    drop(change);
    drop(format);
    graph.reopen(&[options]).unwrap();
    assert_eq!(node.snapshots().len(), 1);
}
