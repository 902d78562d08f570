//! Dirty bitmaps while the image changes under them: sizes, snapshots, reopening, clients.

use std::sync::Arc;

use serde_json::{Value, json};

use block::bitmap::NewBitmap;
use block::nbd::{Address, ExportOptions, Server, ServerOptions};
use block::{Graph, Node, Preallocation, Progress};

use crate::bitmap_tools::{add, close, dirty, joined, one, qemu_dirty, write};
use crate::common::{self, check, create, have_qemu_img, open, path, qemu_img};

#[test]
fn going_back_to_a_snapshot_makes_everything_dirty_and_follows_the_size() {
    if !have_qemu_img("bitmaps and snapshots") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    qemu_img(&["snapshot", "-c", "small", &path(&image)]);
    qemu_img(&["resize", "-q", &path(&image), "96M"]);
    for (name, flag) in [("b", "--enable"), ("off", "--disable")] {
        qemu_img(&["bitmap", "--add", flag, &path(&image), name]);
    }
    let opened = open(&image);
    common::load(&*opened.1.format(), "small");
    assert_eq!(opened.1.size(), 64 << 20);
    assert_eq!(dirty(&opened.1, "b"), one(0..64 << 20));
    assert_eq!(dirty(&opened.1, "off"), []);
    close(opened);
    check(&image);
    assert_eq!(qemu_dirty(dir.path(), &image, "b"), one(0..64 << 20));
    assert_eq!(qemu_dirty(dir.path(), &image, "off"), []);
}

#[test]
fn a_disk_of_10_tib_has_bitmaps_in_bounded_memory() {
    if !have_qemu_img("large bitmaps") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "10T", "");
    let opened = open(&image);
    add(&opened.1, "fine", 4096);
    add(&opened.1, "usual", 65536);
    for n in 0..100 {
        write(&opened.1, n * (100 << 30), &[1; 4096]);
    }
    let error = opened.1.add_bitmap(&NewBitmap {
        name: "too-fine",
        granularity: Some(512),
        persistent: true,
        disabled: false,
    });
    assert_eq!(
        error.unwrap_err().to_string(),
        "Can't make bitmap 'too-fine' persistent in 'd': Too much space will be occupied by the bitmap. Use larger granularity"
    );
    let (fine, usual) = (dirty(&opened.1, "fine"), dirty(&opened.1, "usual"));
    assert_eq!((fine.len(), usual.len()), (100, 100));
    close(opened);
    check(&image);
    assert_eq!(qemu_dirty(dir.path(), &image, "fine"), fine);
    let opened = open(&image);
    assert_eq!(dirty(&opened.1, "usual"), usual);
}

#[test]
fn bitmaps_live_through_a_reopen_and_who_holds_one_goes_on_with_it() {
    if !have_qemu_img("bitmaps and reopen") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    let (graph, node) = open(&image);
    add(&node, "stored", 65536);
    node.add_bitmap(&NewBitmap { name: "memory", ..NewBitmap::default() }).unwrap();
    write(&node, 1 << 20, &[1; 512]);
    let hold = node.bitmaps().get("stored").unwrap().hold().unwrap();
    let options = |read_only: bool| {
        json!({
            "driver": "qcow2", "node-name": "d", "read-only": read_only, "discard": "unmap",
            "file": {"driver": "file", "filename": path(&image)},
        })
    };
    graph.reopen(&[options(true)]).unwrap();
    let first = 1 << 20..(1 << 20) + 65536;
    assert_eq!(qemu_dirty(dir.path(), &image, "stored"), one(first.clone()), "stored, and valid");
    let named = Arc::ptr_eq(&node.bitmaps().get("stored").unwrap(), hold.bitmap());
    assert!(named && hold.bitmap().info().busy);
    graph.reopen(&[options(false)]).unwrap();
    write(&node, 2 << 20, &[1; 512]);
    let both = [first, 2 << 20..(2 << 20) + 65536];
    assert_eq!(dirty(&node, "memory"), both);
    assert_eq!(hold.bitmap().dirty_bytes(), 2 * 65536);
    // The image before this one must not have made the stored bitmap valid again.
    let crashed = dir.path().join("crashed.qcow2");
    std::fs::copy(&image, &crashed).unwrap();
    let (_graph, copy) = open(&crashed);
    assert!(copy.bitmaps().get("stored").unwrap().inconsistent());
    drop(hold);
    close((graph, node));
    check(&image);
    assert_eq!(qemu_dirty(dir.path(), &image, "stored"), both);
}

#[test]
fn a_bitmap_that_was_enabled_while_the_image_was_read_only_follows_later_writes() {
    if !have_qemu_img("bitmaps and reopen") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    let (graph, node) = open(&image);
    add(&node, "b", 65536);
    node.enable_bitmap("b", false).unwrap();
    let options = |read_only: bool| {
        json!({
            "driver": "qcow2", "node-name": "d", "read-only": read_only, "discard": "unmap",
            "file": {"driver": "file", "filename": path(&image)},
        })
    };
    graph.reopen(&[options(true)]).unwrap();
    node.enable_bitmap("b", true).unwrap();
    graph.reopen(&[options(false)]).unwrap();
    write(&node, 1 << 20, &[1; 512]);
    let crashed = dir.path().join("crashed.qcow2");
    std::fs::copy(&image, &crashed).unwrap();
    let (_graph, copy) = open(&crashed);
    assert!(copy.bitmaps().get("b").unwrap().inconsistent());
    close((graph, node));
    assert_eq!(qemu_dirty(dir.path(), &image, "b"), one(1 << 20..(1 << 20) + 65536));
    let (_graph, node) = open(&image);
    assert!(node.bitmaps().get("b").unwrap().enabled());
}

#[test]
fn a_bitmap_is_told_to_nbd_clients_and_is_busy_meanwhile() {
    if !have_qemu_img("bitmaps over NBD") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    let (graph, node) = open(&image);
    add(&node, "b", 4096);
    for n in 0..50 {
        write(&node, n * 1_300_000, &[1; 5000]);
    }
    let bitmap = node.bitmaps().get("b").unwrap();
    let socket = dir.path().join("s");
    let address = Address::Unix(socket.clone());
    let mut server = Server::start(&address, ServerOptions::default(), |_| {}).unwrap();
    let export = ExportOptions {
        id: "e".to_owned(),
        name: "d".to_owned(),
        description: None,
        attachment: graph.attach_export("d", false).unwrap(),
        writable: false,
        allocation_depth: false,
        bitmaps: vec![bitmap.hold().unwrap()],
    };
    server.add_export(export).unwrap();
    let uri = format!(
        "driver=nbd,server.type=unix,server.path={},export=d,x-dirty-bitmap=qemu:dirty-bitmap:b",
        socket.display()
    );
    let map: Value =
        serde_json::from_str(&qemu_img(&["map", "--output=json", "--image-opts", &uri])).unwrap();
    let told = map.as_array().unwrap().iter().filter(|e| e["data"] == false).map(|e| {
        let start = e["start"].as_u64().unwrap();
        start..start + e["length"].as_u64().unwrap()
    });
    assert_eq!(joined(told), dirty(&node, "b"));
    assert!(node.clear_bitmap("b").unwrap_err().to_string().contains("currently in use"));
    server.stop();
    node.clear_bitmap("b").unwrap();
}

#[test]
fn what_is_new_is_dirty_where_the_old_end_lies_within_a_granule() {
    if !have_qemu_img("bitmaps and resize") {
        return;
    }
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let opened = open(&image);
    write(&opened.1, 3 * MIB, &[1; 1 << 20]);
    close(opened);
    qemu_img(&["bitmap", "--add", "-g", "1M", &path(&image), "b"]);
    let opened = open(&image);
    let resize = |size| {
        let node = &opened.1;
        node.resize(size, Preallocation::Off, &Progress::default()).unwrap();
    };
    resize(3 * MIB + 4096);
    assert_eq!(dirty(&opened.1, "b"), []);
    // What was behind the end reads as zeroes now.
    resize(5 * MIB + 512);
    assert_eq!(dirty(&opened.1, "b"), one(3 * MIB..5 * MIB + 512));
    close(opened);
    check(&image);
    assert_eq!(qemu_dirty(dir.path(), &image, "b"), one(3 * MIB..5 * MIB + 512));
}

#[test]
fn bitmaps_follow_the_size_of_the_disk_and_what_is_new_is_dirty() {
    if !have_qemu_img("bitmaps and resize") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    qemu_img(&["bitmap", "--add", "--disable", "-g", "65536", &path(&image), "off"]);
    let opened = open(&image);
    let node = &opened.1;
    let resize = |node: &Node, size| node.resize(size, Preallocation::Off, &Progress::default());
    add(node, "b", 65536);
    write(node, 60 << 20, &[1; 512]);
    resize(node, 32 << 20).unwrap();
    assert_eq!(dirty(node, "b"), []);
    resize(node, 96 << 20).unwrap();
    assert_eq!(dirty(node, "b"), one(32 << 20..96 << 20));
    assert_eq!(dirty(node, "off"), []);
    let hold = node.bitmaps().get("b").unwrap().hold().unwrap();
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    assert_eq!(resize(node, 128 << 20).unwrap_err().to_string(), busy);
    drop(hold);
    close(opened);
    check(&image);
    assert_eq!(qemu_dirty(dir.path(), &image, "b"), one(32 << 20..96 << 20));
    assert_eq!(qemu_dirty(dir.path(), &image, "off"), []);
    let raw = dir.path().join("a.raw");
    std::fs::write(&raw, [0; 65536]).unwrap();
    let graph = Graph::new();
    let node = graph
        .add_text(&format!("driver=raw,node-name=r,file.driver=file,file.filename={}", path(&raw)))
        .unwrap();
    node.add_bitmap(&NewBitmap { name: "b", ..NewBitmap::default() }).unwrap();
    resize(&node, 1 << 20).unwrap();
    assert_eq!(dirty(&node, "b"), one(65536..1 << 20));
    let hold = node.bitmaps().get("b").unwrap().hold().unwrap();
    assert_eq!(resize(&node, 65536).unwrap_err().to_string(), busy);
    drop(hold);
}
