//! Block status, as the formats give it and as clients get it.

use block::bitmap::NewBitmap;
use block::nbd::wire::Mode;
use block::nbd::wire::request::{cmd, cmd_flag};
use block::nbd::{ExportOptions, ServerOptions};
use block::{Node, StatusExtent};

use crate::common::{Setup, have, run};

/// The status of the whole disk.
fn status(node: &Node) -> Vec<StatusExtent> {
    let mut list = Vec::new();
    let mut at = 0;
    while at < node.size() {
        let part = node.access().block_status(at, node.size() - at).unwrap();
        assert!(!part.is_empty());
        for extent in part {
            at += extent.len;
            extent.push_to(&mut list);
        }
    }
    assert_eq!(at, node.size());
    list
}

/// What `nbdinfo` is told of an export in a context: offset, length and number of each extent.
fn told(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let text = run("nbdinfo", &["--json", &format!("--map={context}"), uri]);
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut list: Vec<(u64, u64, u64)> = Vec::new();
    for e in all.as_array().unwrap() {
        let number = |key: &str| e[key].as_u64().unwrap();
        match list.last_mut() {
            Some(last) if last.2 == number("type") => last.1 += number("length"),
            _ => list.push((number("offset"), number("length"), number("type"))),
        }
    }
    list
}

#[test]
fn status_and_depth_of_a_chain_are_what_qemu_nbd_tells() {
    let test = "status_and_depth_of_a_chain_are_what_qemu_nbd_tells";
    if !have(test, "qemu-nbd") || !have(test, "nbdinfo") {
        return;
    }
    let setup = Setup::new(ServerOptions::default());
    let base = setup.create("base.qcow2", "6M", "");
    let base = base.to_str().unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 2M", "-c", "write -z 1M 64k", base]);
    let middle = setup.create("m.qcow2", "6M", &format!("backing_file={base},backing_fmt=qcow2"));
    let middle = middle.to_str().unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write 512k 64k", "-c", "write -c 3M 64k", middle]);
    let options = format!("backing_file={middle},backing_fmt=qcow2");
    let top = setup.create("d.qcow2", "8M", &options);
    let path = top.to_str().unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -z 640k 64k", "-c", "write 4M 192k", path]);
    let contexts = ["base:allocation", "qemu:allocation-depth"];
    let theirs = contexts.map(|context| {
        let socket = setup.path("theirs");
        // It ends with its first client.
        let args = ["-r", "-A", "-f", "qcow2", "-x", "d", "--fork", "-k", &socket, path];
        run("qemu-nbd", &args);
        told(&format!("nbd+unix:///d?socket={socket}"), context)
    });
    // To read only: the servers may not have ended yet, and have it locked as readers do.
    let file = format!("file.driver=file,file.filename={path}");
    let node = setup.graph.add_text(&format!("driver=qcow2,node-name=d,read-only=on,{file}"));
    let node = node.unwrap();
    setup.export("d", false).unwrap();
    assert!(status(&node).len() > 8, "{:?}", status(&node));
    assert_eq!(contexts.map(|context| told(&setup.uri("d"), context)), theirs);
}

#[test]
fn status_of_a_raw_file_is_its_holes() {
    let setup = Setup::with_raw(8 << 20);
    let mut client = setup.client().go("d", Mode::Structured, &["base:allocation"]);
    assert_eq!(client.write(0, 1 << 20, &[7; 65536]), 0);
    let reply = client.call(cmd::BLOCK_STATUS, 0, 0, 8 << 20);
    let rest = (8 << 20) - (1 << 20) - 65536;
    assert_eq!(reply.status, [(0, vec![(1 << 20, 3), (65536, 0), (rest, 3)])]);
}

#[test]
fn every_context_is_told_of_and_one_extent_is_one() {
    let setup = Setup::with_image("8M", "");
    let contexts = ["base:allocation", "qemu:allocation-depth"];
    for mode in [Mode::Structured, Mode::Extended] {
        let mut client = setup.client().go("d", mode, &contexts);
        assert_eq!(client.write(0, 65536, &[7; 65536]), 0);
        let reply = client.call(cmd::BLOCK_STATUS, 0, 0, 8 << 20);
        let rest = (8 << 20) - 131_072;
        let allocation = vec![(65536, 3), (65536, 0), (rest, 3)];
        let depth = vec![(65536, 0), (65536, 1), (rest, 0)];
        assert_eq!(reply.status, [(0, allocation), (1, depth)]);
        let reply = client.call(cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 70_000, 1 << 20);
        assert_eq!(reply.status, [(0, vec![(61_072, 0)]), (1, vec![(61_072, 1)])]);
    }
}

#[test]
fn status_of_a_large_empty_disk_takes_one_request_with_extended_headers() {
    let setup = Setup::with_image("4T", "");
    let mut client = setup.client().go("d", Mode::Extended, &["base:allocation"]);
    let mut at = 0;
    let mut requests = 0;
    while at < 4 << 40 {
        let reply = client.call(cmd::BLOCK_STATUS, 0, at, (4 << 40) - at);
        at += reply.status[0].1.iter().map(|extent| extent.0).sum::<u64>();
        requests += 1;
    }
    assert!(at == 4 << 40 && requests <= 300, "{requests} requests");
}

#[test]
fn a_dirty_bitmap_is_a_context_and_tells_what_was_written() {
    let setup = Setup::new(ServerOptions::default());
    let image = setup.create("d.qcow2", "8M", "");
    let node = setup.open("d", &image);
    let new = NewBitmap { name: "b0", granularity: None, persistent: false, disabled: false };
    node.add_bitmap(&new).unwrap();
    let bitmap = node.bitmaps().get("b0").unwrap();
    setup
        .server
        .add_export(ExportOptions {
            id: "d".to_owned(),
            name: "d".to_owned(),
            description: None,
            attachment: setup.graph.attach_export("d", true).unwrap(),
            writable: true,
            allocation_depth: false,
            bitmaps: vec![bitmap.hold().unwrap()],
        })
        .unwrap();
    assert!(node.remove_bitmap("b0").is_err(), "removed while it is exported");
    let name = "qemu:dirty-bitmap:b0";
    let mut client = setup.client().go("d", Mode::Structured, &[name]);
    assert_eq!(client.call(cmd::BLOCK_STATUS, 0, 0, 8 << 20).status, [(1, vec![(8 << 20, 0)])]);
    assert_eq!(client.write(0, 100_000, &[1; 10]), 0);
    assert_eq!(client.call(cmd::WRITE_ZEROES, 0, 1 << 20, 65536).error, 0);
    let reply = client.call(cmd::BLOCK_STATUS, 0, 0, 8 << 20);
    let middle = (1 << 20) - 131_072;
    let rest = (7 << 20) - 65536;
    let expected = vec![(65536, 0), (65536, 1), (middle, 0), (65536, 1), (rest, 0)];
    assert_eq!(reply.status, [(1, expected)]);
}
