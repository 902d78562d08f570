//! Queues on real files beside a model: every way a request can take, many owners on one image.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::queue::{AlignedBuf, Completion, Op, OwnedBufs, Queue, Request};
use block::{Graph, Node};

use crate::common::{self, Random, check, create, delete, have_qemu_img, qemu_contents, save};

const DISK: u64 = 16 << 20;
/// What one owner has in a row: less than a cluster, so that owners meet in clusters.
const STRIPE: u64 = 8 << 10;
const OWNERS: u64 = 4;

/// One owner: its stripes are those whose number is `who` modulo the owners.
struct Owner {
    who: u64,
    random: Random,
    queue: Queue,
    model: Vec<u8>,
    /// In flight: what a read must give.
    expected: HashMap<u64, Option<(u64, Vec<u8>)>>,
    /// Quarters of stripes that requests in flight touch.
    busy: HashMap<u64, u64>,
    next: u64,
    done: Vec<Completion>,
}

impl Owner {
    fn new(node: &Arc<Node>, who: u64, model: Vec<u8>) -> Self {
        Self {
            who,
            random: Random(who + 77),
            queue: Queue::new(node.clone()).unwrap(),
            model,
            expected: HashMap::new(),
            busy: HashMap::new(),
            next: 0,
            done: Vec::new(),
        }
    }

    /// A range in a stripe of ours that nothing in flight touches, in quarters of stripes.
    fn place(&mut self) -> Option<(u64, u64)> {
        let stripe = self.random.below(DISK / STRIPE / OWNERS) * OWNERS + self.who;
        let quarter = STRIPE / 4;
        let first = stripe * 4 + self.random.below(4);
        let count = self.random.below((stripe + 1) * 4 - first) + 1;
        let free = (first..first + count).all(|q| !self.busy.values().any(|b| *b == q));
        if !free {
            return None;
        }
        let (mut at, mut len) = (first * quarter, count * quarter);
        if self.random.below(3) == 0 {
            at += self.random.below(quarter / 2);
            len = self.random.below(len / 2) + 1;
        }
        // One quarter stands for the range: others are marked by keys of their own below.
        Some((at, len))
    }

    fn submit(&mut self) {
        let Some((at, len)) = self.place() else {
            return;
        };
        let id = self.next;
        self.next += 64;
        for (n, quarter) in (at / (STRIPE / 4)..=(at + len - 1) / (STRIPE / 4)).enumerate() {
            self.busy.insert(id + n as u64, quarter);
        }
        let span = at as usize..(at + len) as usize;
        let fua = self.random.below(50) == 0;
        let mut expected = None;
        let request = match self.random.below(20) {
            0..8 => {
                expected = Some((at, self.model[span].to_vec()));
                Request::read(id, at, self.memory(len))
            }
            8..17 => {
                let bytes = self.random.bytes(len);
                self.model[span].copy_from_slice(&bytes);
                let mut buf = AlignedBuf::new(bytes.len());
                buf.copy_from_slice(&bytes);
                let bufs = if self.random.below(2) == 0 {
                    OwnedBufs::from_aligned(buf)
                } else {
                    OwnedBufs::from_vec(bytes)
                };
                Request::write(id, at, fua, bufs)
            }
            17 => Request::plain(id, Op::Flush),
            _ => {
                self.model[span].fill(0);
                Request::plain(id, Op::WriteZeroes { offset: at, len, unmap: true, fua })
            }
        };
        self.expected.insert(id, expected);
        self.queue.submit(request);
    }

    /// Memory for a read, of either kind, with something in it.
    fn memory(&mut self, len: u64) -> OwnedBufs {
        let len = len as usize;
        match self.random.below(2) {
            0 => OwnedBufs::from_vec(vec![0xa5; len]),
            _ => OwnedBufs::from_aligned(AlignedBuf::new(len)),
        }
    }

    fn reap(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.queue.reap(&mut done);
        for completion in done.drain(..) {
            completion.result.unwrap();
            let expected = self.expected.remove(&completion.id).unwrap();
            if let Some((at, bytes)) = expected {
                assert!(completion.bufs.as_slice().unwrap() == bytes, "read at {at:#x}");
            }
            self.busy.retain(|key, _| key / 64 != completion.id / 64);
        }
        self.done = done;
    }

    fn work(&mut self, rounds: u64) {
        for _ in 0..rounds {
            for _ in 0..self.random.below(24) {
                self.submit();
            }
            if self.random.below(2) == 0 {
                self.queue.kick();
            } else {
                self.queue.wait();
            }
            self.reap();
        }
        while self.queue.in_flight() > 0 {
            self.queue.wait();
            self.reap();
        }
        assert!(self.expected.is_empty());
    }
}

fn open(image: &Path, options: &str) -> (Graph, Arc<Node>) {
    let graph = Graph::new();
    let image = image.display();
    let node = graph
        .add_text(&format!(
            "node-name=d,discard=unmap,{options},file.driver=file,file.filename={image}"
        ))
        .unwrap();
    (graph, node)
}

/// Lets all owners work, beside snapshots if asked, and compares what they made with QEMU's view.
fn owners(dir: &Path, image: &Path, options: &str, before: &[u8], snapshots: bool) {
    let (graph, node) = open(image, options);
    let running = AtomicBool::new(true);
    let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..OWNERS)
            .map(|who| {
                let mut owner = Owner::new(&node, who, before.to_vec());
                scope.spawn(move || {
                    owner.work(30);
                    owner.model
                })
            })
            .collect();
        if snapshots {
            scope.spawn(|| {
                while running.load(Ordering::Acquire) {
                    let format = node.format();
                    save(&*format, "round");
                    format.flush().unwrap();
                    delete(&*format, "round");
                }
            });
        }
        let models = workers.into_iter().map(|w| w.join()).collect::<Vec<_>>();
        running.store(false, Ordering::Release);
        models.into_iter().map(|m| m.unwrap()).collect()
    });
    drop((graph, node));
    let disk = if options.contains("driver=raw") {
        std::fs::read(image).unwrap()
    } else {
        check(image);
        qemu_contents(dir, image, None)
    };
    for stripe in 0..DISK / STRIPE {
        let span = (stripe * STRIPE) as usize..((stripe + 1) * STRIPE) as usize;
        let model = &models[(stripe % OWNERS) as usize];
        assert!(disk[span.clone()] == model[span], "{options}: stripe {stripe}");
    }
}

#[test]
fn many_owners_of_queues_on_one_image_lose_nothing() {
    if !have_qemu_img("queues") {
        return;
    }
    for (format, create_options, snapshots) in [
        ("qcow2", "", false),
        ("qcow2", "", true),
        ("qcow2", "cluster_size=4k", true),
        ("qcow2", "cluster_size=2M", false),
        ("qcow2", "preallocation=full", false),
        ("raw", "", false),
    ] {
        for how in
            ["file.aio=io_uring", "file.aio=threads", "cache.direct=on", "detect-zeroes=unmap"]
        {
            let dir = tempfile::tempdir().unwrap();
            let image = if format == "raw" {
                let image = dir.path().join("a.raw");
                std::fs::File::create(&image).unwrap().set_len(DISK).unwrap();
                image
            } else {
                create(dir.path(), "a.qcow2", "16M", create_options)
            };
            let options = format!("driver={format},{how}");
            owners(dir.path(), &image, &options, &vec![0; DISK as usize], snapshots);
        }
    }
}

#[test]
fn queues_over_a_backing_file_read_through_it_and_copy_what_they_change() {
    if !have_qemu_img("queues over a backing file") {
        return;
    }
    for (how, with, snapshots) in [
        ("file.aio=io_uring", "", false),
        ("file.aio=io_uring", "", true),
        ("file.aio=threads", ",extended_l2=on", true),
        ("cache.direct=on", "", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let base = create(dir.path(), "base.qcow2", "10M", "cluster_size=4k");
        let mut before = Random(5).bytes(10 << 20);
        {
            let (_graph, node) = common::open(&base);
            node.write(0, &[block::WriteBuf::new(&before)]).unwrap();
        }
        before.resize(DISK as usize, 0);
        let options = format!("backing_file={},backing_fmt=qcow2{with}", base.display());
        let image = create(dir.path(), "top.qcow2", "16M", &options);
        owners(dir.path(), &image, &format!("driver=qcow2,{how}"), &before, snapshots);
    }
}

/// The owner of a queue that is not reaped holds a range; who waits for it goes on when it is.
#[test]
fn a_request_in_the_way_of_another_queue_is_waited_for() {
    if !have_qemu_img("two queues") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "16M", "preallocation=full");
    let (_graph, node) = open(&image, "driver=qcow2,cache.direct=on");
    node.read(0, &[block::ReadBuf::new(&mut [0; 512])]).unwrap();
    let mut first = Queue::new(node.clone()).unwrap();
    let mut second = Queue::new(node.clone()).unwrap();
    let mut done = Vec::new();
    for round in 0..20u64 {
        // Each round has a cluster of its own: a zeroed one is not written in place, and so not located.
        let cluster = round * 65536;
        let mut buf = AlignedBuf::new(4096);
        buf.fill(round as u8);
        first.submit(Request::write(round, cluster + 4096, false, OwnedBufs::from_aligned(buf)));
        first.kick();
        // Zeroing the cluster needs it alone.
        let zero = Op::WriteZeroes { offset: cluster, len: 65536, unmap: false, fua: false };
        second.submit(Request::plain(round, zero));
        second.kick();
        first.drain(&mut done);
        second.drain(&mut done);
        assert!(done.drain(..).all(|c| c.result.is_ok()));
        assert_eq!(common::read(&*node.format(), cluster + 4096, 4096), [0; 4096], "round {round}");
    }
}
