//! A reopen beside a flush of another disk that makes up for what this one could not write.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;

use crate::node::{Details, Node};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::{Probe, Qcow2, check};
use crate::storage::{FileOptions, FileStorage, Storage};
use crate::{Error, Graph, NewSnapshot, Progress, ReadBuf, Result, Together, WriteBuf};

const SIZE: usize = 300_000;

/// A file whose writes can be made to fail, and of whose flushes some can be held back.
#[derive(Debug)]
struct Faulty {
    file: Arc<dyn Storage>,
    fails: AtomicBool,
    hold: Mutex<Option<Hold>>,
}

/// A flush that is to be held back.
#[derive(Debug)]
struct Hold {
    /// How many are let through before it.
    before: u32,
    begin: Sender<()>,
    gone: Receiver<()>,
}

impl Storage for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }
    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.file.read_at(offset, bufs)
    }
    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        if self.fails.load(Ordering::Acquire) {
            let source = std::io::Error::other("injected");
            return Err(Error::Io {
                operation: "write",
                filename: "faulty".into(),
                offset,
                source,
            });
        }
        self.file.write_at(offset, bufs)
    }
    fn flush(&self) -> Result<()> {
        let mut hold = self.hold.lock().unwrap();
        match hold.take() {
            Some(Hold { before: 0, begin, gone }) => {
                begin.send(()).unwrap();
                // An error: nobody holds it any more.
                let _ = gone.recv();
            }
            Some(later) => *hold = Some(Hold { before: later.before - 1, ..later }),
            None => {}
        }
        drop(hold);
        self.file.flush()
    }
    fn len(&self) -> Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.file.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.file.write_zeroes(offset, len, unmap)
    }
    fn allocated(&self) -> Result<u64> {
        self.file.allocated()
    }
    fn read_only(&self) -> bool {
        false
    }
}

fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, FileOptions::default()).unwrap())
}

/// A node with a snapshot of ones, whose disk has twos now.
fn disk(graph: &Graph, dir: &Path, name: &str) -> Arc<Node> {
    let path = dir.join(name);
    std::fs::write(&path, []).unwrap();
    let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    create(&*file(&path), None, &options, &Progress::default()).unwrap();
    let path = path.to_str().unwrap();
    graph
        .add(&json!({ "driver": "file", "node-name": format!("f{name}"), "filename": path }))
        .unwrap();
    let options = json!({ "driver": "qcow2", "node-name": name, "file": format!("f{name}") });
    let node = graph.add(&options).unwrap();
    node.write(0, &[WriteBuf::new(&[1; SIZE])]).unwrap();
    let new = NewSnapshot { tag: "s".to_owned(), date_sec: 1, date_nsec: 0, vm_clock_nsec: 0 };
    let format = node.format();
    let mut save = format.create_snapshot(&new).unwrap();
    save.prepare().unwrap();
    save.publish().unwrap();
    save.finish().unwrap();
    node.write(0, &[WriteBuf::new(&[2; SIZE])]).unwrap();
    node.flush().unwrap();
    drop(save);
    node
}

/// Has an image keep its bytes in a file that can fail.
fn make_faulty(node: &Node) -> Arc<Faulty> {
    let details = node.details();
    let file = details.storage.clone().unwrap();
    let faulty = Arc::new(Faulty { file, fails: AtomicBool::new(false), hold: Mutex::default() });
    let closed = node.close_gate();
    let probe = Probe::new(faulty.clone()).unwrap();
    let image = Qcow2::open(probe, None, false).unwrap().into_shared();
    let details = Details {
        storage: Some(faulty.clone()),
        bitmaps: image.bitmaps().clone(),
        qcow2: Some(image.clone()),
        ..(*details).clone()
    };
    node.replace(&closed, image, details);
    faulty
}

/// Has both disks go back to their snapshots in memory, and one of them not on disk.
fn load(good: &Node, bad: &Node, faulty: &Faulty) -> Arc<Together> {
    let together = Together::new(2);
    let formats = [good, bad].map(|node| node.format());
    let [mut good, mut bad] = formats.each_ref().map(|format| {
        let mut change = format.revert_snapshot("1").unwrap();
        change.prepare().unwrap();
        change.show(&together).unwrap();
        change
    });
    faulty.fails.store(true, Ordering::Release);
    bad.publish().unwrap_err();
    good.publish().unwrap();
    good.finish().unwrap();
    faulty.fails.store(false, Ordering::Release);
    together
}

#[test]
fn a_reopen_waits_for_a_flush_of_another_disk_that_makes_up_for_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    let (good, bad) = (disk(&graph, dir.path(), "good"), disk(&graph, dir.path(), "bad"));
    let faulty = make_faulty(&bad);
    let together = load(&good, &bad, &faulty);

    let (begin, begun) = channel();
    let (go, gone) = channel::<()>();
    // That of the header comes first, with the format's lock held.
    *faulty.hold.lock().unwrap() = Some(Hold { before: 1, begin, gone });
    thread::scope(|scope| {
        let flush = scope.spawn(|| good.flush());
        begun.recv().unwrap();
        let handles = Arc::strong_count(&together);
        let options = [json!({
            "driver": "qcow2", "node-name": "bad", "file": "fbad", "read-only": true
        })];
        let graph = graph.clone();
        let reopen = scope.spawn(move || graph.reopen(&options));
        // It comes to wait for the flush, unless it is refused.
        while !reopen.is_finished() && Arc::strong_count(&together) == handles {
            thread::yield_now();
        }
        assert!(!flush.is_finished());
        drop(go);
        flush.join().unwrap().unwrap();
        reopen.join().unwrap().unwrap();
    });
    assert!(bad.read_only() && !good.read_only());
    for node in [&good, &bad] {
        let mut bytes = vec![9; SIZE];
        node.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1), "{}", node.name());
    }
    good.flush().unwrap();
    drop((good, bad, graph, faulty));
    for name in ["good", "bad"] {
        let report = check::check(&*file(&dir.path().join(name)), &check::Options::default());
        let report = report.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
    }
}
