//! What the tests of bitmaps share: QEMU's storage daemon, and what is dirty as each side tells it.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};

use block::bitmap::NewBitmap;
use block::{Node, WriteBuf};

use crate::common::{Start as _, path, qemu_img};

/// A storage daemon with the image as node "d".
pub(crate) struct Daemon {
    child: std::process::Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Daemon {
    pub(crate) fn start(image: &Path, options: &str) -> Self {
        let node = format!(
            "driver=qcow2,node-name=d,file.driver=file,file.filename={}{options}",
            image.display()
        );
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--chardev", "stdio,id=m", "--monitor", "m", "--blockdev", &node])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .start()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut this = Self { child, answers };
        this.answers.next().unwrap().unwrap();
        this.run("qmp_capabilities", &json!({}));
        this
    }

    /// The answer to a command: what it returns or its error.
    pub(crate) fn run(&mut self, command: &str, arguments: &Value) -> Value {
        // In one piece: the daemon ends at the brace of `quit`.
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        loop {
            let text = self.answers.next().unwrap().unwrap();
            let answer: Value = serde_json::from_str(&text).unwrap();
            if answer.get("event").is_none() {
                return answer;
            }
        }
    }

    pub(crate) fn bitmaps(&mut self) -> Value {
        let nodes = self.run("query-named-block-nodes", &json!({"flat": true}));
        let nodes = nodes["return"].as_array().unwrap();
        nodes.iter().find(|node| node["node-name"] == "d").unwrap()["dirty-bitmaps"].clone()
    }

    pub(crate) fn quit(mut self) {
        self.run("quit", &json!({}));
        assert!(self.child.wait().unwrap().success());
    }
}

/// What is dirty in a bitmap, as QEMU tells it over NBD.
pub(crate) fn qemu_dirty(dir: &Path, image: &Path, bitmap: &str) -> Vec<Range<u64>> {
    let mut daemon = Daemon::start(image, ",read-only=on");
    let socket = dir.join("nbd.sock");
    let addr = json!({"addr": {"type": "unix", "data": {"path": path(&socket)}}});
    let started = daemon.run("nbd-server-start", &addr);
    assert_eq!(started["return"], json!({}), "{started}");
    daemon.run("block-dirty-bitmap-disable", &json!({"node": "d", "name": bitmap}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "d", "bitmaps": [bitmap]});
    let added = daemon.run("block-export-add", &export);
    assert_eq!(added["return"], json!({}), "{added}");
    let uri = format!(
        "driver=nbd,server.type=unix,server.path={},export=d,x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = qemu_img(&["map", "--output=json", "--image-opts", &uri]);
    daemon.quit();
    let map: Value = serde_json::from_str(&map).unwrap();
    // "data" is false where the bitmap is dirty.
    let dirty = map.as_array().unwrap().iter().filter(|e| e["data"] == false);
    joined(dirty.map(|e| {
        let start = e["start"].as_u64().unwrap();
        start..start + e["length"].as_u64().unwrap()
    }))
}

pub(crate) fn joined(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

/// What is dirty in a bitmap of ours.
pub(crate) fn dirty(node: &Node, bitmap: &str) -> Vec<Range<u64>> {
    let bitmap = node.bitmaps().get(bitmap).unwrap();
    let mut all = Vec::new();
    let mut at = 0;
    // In steps, as an NBD client would ask.
    while at < node.size() {
        let extents = bitmap.extents(at, node.size() - at, 3);
        at = extents.last().map(|e| e.offset + e.len).unwrap();
        all.extend(extents);
    }
    joined(all.into_iter().filter(|e| e.dirty).map(|e| e.offset..e.offset + e.len))
}

pub(crate) fn one(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

pub(crate) fn write(node: &Node, offset: u64, bytes: &[u8]) {
    node.write(offset, &[WriteBuf::new(bytes)]).unwrap();
}

pub(crate) fn add(node: &Node, name: &str, granularity: u64) {
    let granularity = Some(granularity);
    node.add_bitmap(&NewBitmap { name, granularity, persistent: true, disabled: false }).unwrap();
}

pub(crate) fn close(opened: (block::Graph, Arc<Node>)) {
    let (graph, node) = opened;
    drop(node);
    graph.remove("d").unwrap();
}
