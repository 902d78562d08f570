//! block-stream, block-commit and change-backing-file: chains that get shorter under their users.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use block::jobs::{
    Action, Commit, CommitOptions, Control, Notice, OnError, Operation, Stream, StreamOptions,
};
use block::{Attachment, Error, Graph, Link, Node, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, Random, check, create, have_qemu_img, path, qemu_img, qemu_io};
use crate::graphs::device;

mod active;
mod names;
mod refused;
mod under_writes;

const MIB: usize = 1 << 20;
const SIZE: usize = 5 * MIB;

/// A chain of images, the lowest first, each with something of its own, and what its top reads as.
struct Chain {
    dir: tempfile::TempDir,
    images: Vec<PathBuf>,
    contents: Vec<u8>,
}

/// The sizes of images in the middle are smaller and larger than those of others.
fn chain(layers: usize, options: &str) -> Chain {
    let dir = tempfile::tempdir().unwrap();
    let mut images: Vec<PathBuf> = Vec::new();
    for n in 0..layers {
        let size = match n {
            0 => 3 * MIB,
            1 => 4 * MIB,
            _ => SIZE,
        };
        let mut all = options.to_owned();
        if let Some(below) = images.last() {
            all += &format!(",backing_file={},backing_fmt=qcow2", path(below));
        }
        let name = format!("{n}.qcow2");
        let image = create(dir.path(), &name, &size.to_string(), all.trim_start_matches(','));
        // Data that only this layer has, that it has above others, and zeroes over data of others.
        let value = n + 1;
        let own = 100_000 + n * 250_000;
        qemu_io(
            &image,
            &[
                &format!("write -P {value} {own} 200000"),
                &format!("write -P {value} {} 70000", 2 * MIB + n * 30_000),
                &format!("write -z {} 65536", 2 * MIB + 400_000 + n * 20_000),
                &format!("write -P {value} {} 4096", size - 4096),
            ],
        );
        images.push(image);
    }
    let contents = common::qemu_contents(dir.path(), images.last().unwrap(), None);
    Chain { dir, images, contents }
}

impl Chain {
    fn top(&self) -> &Path {
        self.images.last().unwrap()
    }

    /// A graph with the images as nodes "n0", "n1", ..., all but the last read-only.
    fn open(&self) -> Graph {
        let graph = Graph::new();
        for (n, image) in self.images.iter().enumerate() {
            let mut options = json!({
                "driver": "qcow2", "node-name": format!("n{n}"), "discard": "unmap",
                "read-only": n + 1 != self.images.len(),
                "file": {"driver": "file", "filename": path(image)},
            });
            if n > 0 {
                options["backing"] = json!(format!("n{}", n - 1));
            }
            graph.add(&options).unwrap();
        }
        graph
    }

    /// What the images name as their backing files, from the top down.
    fn names(&self) -> Vec<PathBuf> {
        let chain =
            qemu_img(&["info", "-U", "--backing-chain", "--output", "json", &path(self.top())]);
        let chain: Vec<Value> = serde_json::from_str(&chain).unwrap();
        chain.iter().map(|image| PathBuf::from(image["filename"].as_str().unwrap())).collect()
    }

    /// With nobody using the images: the chain is that of these layers, and it reads as it should.
    fn closed_is(&self, layers: &[usize], contents: &[u8]) {
        let expected: Vec<_> = layers.iter().rev().map(|&n| self.images[n].clone()).collect();
        assert_eq!(self.names(), expected);
        for &layer in layers {
            check(&self.images[layer]);
        }
        assert!(common::qemu_contents(self.dir.path(), self.top(), None) == contents);
    }

    /// Copies of the images as they are on disk, which read as they should: a killed process leaves them.
    fn survives(&self, contents: &[u8]) {
        let copies = tempfile::tempdir().unwrap();
        for image in &self.images {
            std::fs::copy(image, copies.path().join(image.file_name().unwrap())).unwrap();
        }
        let copy = |image: &Path| copies.path().join(image.file_name().unwrap());
        let names = self.names();
        for pair in names.windows(2) {
            qemu_img(&[
                "rebase",
                "-u",
                "-b",
                &path(&copy(&pair[1])),
                "-F",
                "qcow2",
                &path(&copy(&pair[0])),
            ]);
        }
        for name in &names {
            common::check_leaks_only(&copy(name));
        }
        assert!(common::qemu_contents(copies.path(), &copy(self.top()), None) == contents);
    }
}

fn read(link: &Link) -> Vec<u8> {
    let entered = link.enter();
    let mut bytes = vec![0xee; entered.access().size() as usize];
    entered.access().read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

/// The nodes with what they are over and what their images name; not how much is in them.
fn picture(graph: &Graph) -> Vec<String> {
    let of = |node: &Arc<Node>| {
        let info = serde_json::to_value(node.info(true).unwrap()).unwrap();
        let image = &info["image"];
        let backing = node.backing().map(|node| node.name().to_owned());
        format!(
            "{} {} {} over {backing:?}, which it calls {} ({})",
            info["node-name"],
            if node.read_only() { "ro" } else { "rw" },
            info["file"],
            image["full-backing-filename"],
            image["backing-filename-format"],
        )
    };
    graph.list().iter().map(of).collect()
}

fn stream(base_node: Option<&str>) -> StreamOptions {
    StreamOptions {
        device: "n3".to_owned(),
        base_node: base_node.map(str::to_owned),
        ..StreamOptions::default()
    }
}

fn commit(top: &str, base: &str) -> CommitOptions {
    CommitOptions {
        device: "n3".to_owned(),
        top_node: Some(top.to_owned()),
        base_node: Some(base.to_owned()),
        ..CommitOptions::default()
    }
}

/// What is done to a chain of four, and which layers are left.
#[derive(Debug, Clone)]
enum Work {
    Stream(StreamOptions),
    Commit(CommitOptions),
}

impl Work {
    fn all() -> Vec<(Self, Vec<usize>)> {
        vec![
            (Self::Stream(stream(None)), vec![3]),
            (Self::Stream(stream(Some("n1"))), vec![0, 1, 3]),
            (Self::Stream(stream(Some("n0"))), vec![0, 3]),
            (Self::Commit(commit("n2", "n1")), vec![0, 1, 3]),
            (Self::Commit(commit("n2", "n0")), vec![0, 3]),
            (Self::Commit(commit("n1", "n0")), vec![0, 2, 3]),
        ]
    }

    fn start(&self, graph: &Graph) -> Box<dyn Operation> {
        match self {
            Self::Stream(options) => Box::new(Stream::new(graph, options).unwrap()),
            Self::Commit(options) => Box::new(Commit::new(graph, options).unwrap()),
        }
    }
}

fn watched() -> (Control, Receiver<Notice>) {
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    (Control::new(move |notice| tell.lock().unwrap().send(notice).unwrap()), told)
}

/// Writes all over the disk until it is told to stop; gives what the disk has then.
fn write_on(link: &Link, mut model: Vec<u8>, stop: &AtomicBool, wrote: &dyn Fn()) -> Vec<u8> {
    let mut random = Random(99);
    while !stop.load(Ordering::Acquire) {
        let len = 1 + random.below(9000) as usize;
        let at = random.below((model.len() - len) as u64) as usize;
        let bytes = random.bytes(len as u64);
        match random.below(8) {
            0 => {
                model[at..at + len].fill(0);
                link.write_zeroes(at as u64, len as u64, true, false).unwrap();
            }
            1 => link.flush().unwrap(),
            _ => {
                model[at..at + len].copy_from_slice(&bytes);
                link.write(at as u64, &[WriteBuf::new(&bytes)], false).unwrap();
            }
        }
        wrote();
    }
    model
}
