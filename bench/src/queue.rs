//! The block engine in process, beside `qemu-img bench -i io_uring`: the same requests, one after
//! another in steps, on the same image.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use block::Graph;
use block::queue::{AlignedBuf, Completion, OwnedBufs, Queue, Request};

use crate::images::{Image, Images, Kind};
use crate::report::Report;
use crate::settle;

/// Rounds; the report tells medians.
const ROUNDS: usize = 5;

/// How often the peer is started until it gives a number.
const TRIES: usize = 10;

const OURS: &str = "Tardigrade";
const QEMU: &str = "qemu-img bench";

/// Requests as `qemu-img bench` makes them.
#[derive(Debug, Clone, Copy)]
struct Load {
    name: &'static str,
    kind: Kind,
    write: bool,
    direct: bool,
    /// Bytes of a request.
    len: u64,
    /// Bytes from one request to the next.
    step: u64,
    /// Requests in flight.
    depth: u64,
    count: u64,
}

/// Reads of 4 KiB from the page cache, to be changed.
const BASE: Load = Load {
    name: "",
    kind: Kind::Full,
    write: false,
    direct: false,
    len: 4 << 10,
    step: 4 << 10,
    depth: 32,
    count: 400_000,
};

/// Of an empty image: each request takes a cluster.
const ALLOCATING: Load =
    Load { kind: Kind::Empty, write: true, step: 64 << 10, count: 32_768, ..BASE };

const LOADS: [Load; 10] = [
    Load { name: "4 KiB read, depth 1", depth: 1, ..BASE },
    Load { name: "4 KiB read, depth 32", ..BASE },
    Load { name: "4 KiB write, depth 1", write: true, depth: 1, count: 200_000, ..BASE },
    Load { name: "4 KiB write, depth 32", write: true, count: 200_000, ..BASE },
    Load { name: "4 KiB write, allocating, depth 1", depth: 1, ..ALLOCATING },
    Load { name: "4 KiB write, allocating, depth 32", ..ALLOCATING },
    Load { name: "4 KiB read, O_DIRECT, depth 1", direct: true, depth: 1, count: 20_000, ..BASE },
    Load { name: "4 KiB read, O_DIRECT, depth 32", direct: true, count: 100_000, ..BASE },
    Load {
        name: "4 KiB write, O_DIRECT, depth 32",
        write: true,
        direct: true,
        count: 50_000,
        ..BASE
    },
    Load {
        name: "1 MiB read, depth 8",
        len: 1 << 20,
        step: 1 << 20,
        depth: 8,
        count: 2_000,
        ..BASE
    },
];

/// Measures everything whose name contains `filter`.
pub(crate) fn measure(dir: &Path, filter: &str, report: &mut Report) {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return report.note("qemu-img is not here, so nothing in process is measured");
    }
    let images = Images::make(dir);
    let loads: Vec<_> = LOADS.into_iter().filter(|load| load.name.contains(filter)).collect();
    for round in 0..ROUNDS {
        for load in &loads {
            let mut order = [OURS, QEMU];
            order.rotate_left(round % 2);
            for who in order {
                let image = images.fresh(load.kind);
                image.files().for_each(settle::warm);
                if !settle::settle(images.dir()) {
                    report.note_once("Others wrote to the disk during the measurements.");
                }
                if load.kind == Kind::Empty {
                    settle::back_memory(images.dir(), load.count * load.len);
                }
                let time =
                    if who == OURS { ours(&image, load) } else { theirs(&image, load, report) };
                let rate = load.count as f64 / time.as_secs_f64();
                report.add(&title(load), who, 0, rate);
                eprintln!("{}, {who}, round {}: {rate:.0}/s", title(load), round + 1);
            }
        }
    }
    report.section(move |report| table(report, &loads));
}

fn title(load: &Load) -> String {
    format!("in process: {}", load.name)
}

fn table(report: &Report, loads: &[Load]) -> String {
    let mut text = format!(
        "| Block engine in process: requests per second | ours | {QEMU} | times | of the rounds |\n|---|---:|---:|---:|---:|\n"
    );
    for load in loads {
        let _ = writeln!(text, "{}", report.compared(load.name, &title(load), OURS, QEMU));
    }
    text += "\n";
    text
}

/// Where requests end at once it overruns its stack now and then (10.0): it is started again.
fn theirs(image: &Image, load: &Load, report: &mut Report) -> Duration {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-f", "qcow2", "-i", "io_uring"]);
    command.args(["-t", if load.direct { "none" } else { "writeback" }]);
    command.args(["-c", &load.count.to_string(), "-d", &load.depth.to_string()]);
    command.args(["-s", &load.len.to_string(), "-S", &load.step.to_string()]);
    if load.write {
        command.arg("-w");
    }
    command.arg(&image.path);
    for _ in 0..TRIES {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let mut lines = text.lines();
        let seconds = lines
            .find_map(|line| line.strip_prefix("Run completed in ")?.strip_suffix(" seconds."));
        if let Some(seconds) = seconds {
            return Duration::from_secs_f64(seconds.parse().unwrap());
        }
        report.note_once(&format!("qemu-img bench now and then ends with {}.", output.status));
    }
    panic!("qemu-img bench does not come to an end");
}

fn ours(image: &Image, load: &Load) -> Duration {
    let graph = Graph::new();
    let node = graph
        .add_text(&format!(
            "driver=qcow2,node-name=d,read-only={},cache.direct={},file.driver=file,file.aio=io_uring,file.filename={}",
            if load.write { "off" } else { "on" },
            if load.direct { "on" } else { "off" },
            image.path.display()
        ))
        .unwrap();
    let disk = node.size();
    let mut queue = Queue::new(node).unwrap();
    let len = usize::try_from(load.len).unwrap();
    let buf = || OwnedBufs::from_aligned(AlignedBuf::new(len));
    let mut spare: Vec<OwnedBufs> = (0..load.depth).map(|_| buf()).collect();
    let mut done: Vec<Completion> = Vec::new();
    let (mut sent, mut ended) = (0, 0);
    let start = Instant::now();
    while ended < load.count {
        while sent < load.count
            && let Some(bufs) = spare.pop()
        {
            let at = sent * load.step % disk;
            queue.submit(if load.write {
                Request::write(sent, at, false, bufs)
            } else {
                Request::read(sent, at, bufs)
            });
            sent += 1;
        }
        queue.wait();
        queue.reap(&mut done);
        for completion in done.drain(..) {
            completion.result.unwrap();
            spare.push(completion.bufs);
            ended += 1;
        }
    }
    // Neither flushes.
    start.elapsed()
}
