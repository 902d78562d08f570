//! Internal snapshots of a large image, beside `qemu-img snapshot` on the same image; opening one with
//! many snapshots; memory.
//!
//! Ours is this program started anew for each measurement, so that both have a process's start and
//! end in their time, and so that memory is that of one piece of work.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use block::{Graph, NewSnapshot, Node, ReadBuf, SnapshotChange, WriteBuf};
use serde_json::{Value, json};

use crate::report::Report;

const ROUNDS: usize = 3;
/// Snapshots of the image that is opened.
const MANY: usize = 1000;
/// Reads and writes all over the disk, for the memory that an open image takes.
const REQUESTS: u64 = 8192;

const OURS: &str = "Tardigrade";
const QEMU: &str = "qemu-img";

/// The argument that starts a piece of work in a process of its own.
pub(crate) const CHILD: &str = "snapshots-child";

const CREATE: &str = "create a snapshot of the 1 TiB image";
const DELETE: &str = "delete it";
const LIST: &str = "open an image with 1000 snapshots and list them";
const OPEN: &str = "the opening of it, in the process";
const MEMORY: &str = "memory for ";

/// Everything of this module.
pub(crate) fn measure(dir: &Path, report: &mut Report) {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return report.note("qemu-img is not here, so nothing of large images is measured");
    }
    let dir = tempfile::Builder::new().prefix("snapshots").tempdir_in(dir).unwrap();
    let (large, many) = (dir.path().join("large.qcow2"), dir.path().join("many.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"], &large, &["1T"]);
    qemu_img(&["create", "-q", "-f", "qcow2"], &many, &["1G"]);
    child("fill", &many);
    for round in 0..ROUNDS {
        eprintln!("snapshots, round {}", round + 1);
        for (what, work, flag) in [(CREATE, "create", "-c"), (DELETE, "delete", "-d")] {
            let (time, used) = timed(|| child(work, &large));
            report.add(what, OURS, 0, time);
            report.add(&format!("{MEMORY}{what}"), OURS, 0, used.peak);
            if what == DELETE {
                // Made by ours, made again by theirs, deleted by theirs.
                let (time, ()) = timed(|| qemu_img(&["snapshot", "-c", "speed"], &large, &[]));
                report.add(CREATE, QEMU, 0, time);
                let (time, ()) = timed(|| qemu_img(&["snapshot", flag, "speed"], &large, &[]));
                report.add(DELETE, QEMU, 0, time);
            }
        }
        let (time, ()) = timed(|| qemu_img(&["snapshot", "-l"], &many, &[]));
        report.add(LIST, QEMU, 0, time);
        let (time, used) = timed(|| child("open", &many));
        report.add(LIST, OURS, 0, time);
        report.add(OPEN, OURS, 0, used.seconds);
    }
    let what = format!("{MEMORY}{REQUESTS} reads and writes all over the 1 TiB image");
    report.add(&what, OURS, 0, child("work", &large).peak);
    report.section(table);
}

fn qemu_img(before: &[&str], image: &Path, after: &[&str]) {
    let output = Command::new("qemu-img").args(before).arg(image).args(after).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {before:?}: {text}");
}

fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed().as_secs_f64(), result)
}

/// What a piece of work took.
struct Used {
    seconds: f64,
    /// MiB
    peak: f64,
}

/// Does a piece of work in a process of its own.
fn child(work: &str, image: &Path) -> Used {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([CHILD, work])
        .arg(image)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "{work} of {}", image.display());
    let used: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |name: &str| used[name].as_f64().unwrap();
    Used { seconds: number("seconds"), peak: number("peak") }
}

/// The child.
pub(crate) fn run_child(work: &str, image: &str) {
    let graph = Graph::new();
    let options = json!({
        "driver": "qcow2", "node-name": "d", "discard": "unmap",
        "cache": { "no-flush": work == "fill" },
        "file": { "driver": "file", "filename": image }
    });
    let start = Instant::now();
    let node = graph.add(&options).unwrap();
    match work {
        "create" => create(&node),
        "delete" => {
            let id = node.format().snapshots().last().unwrap().id.clone();
            finish(&mut *node.format().delete_snapshot(&id).unwrap());
        }
        "open" => assert_eq!(node.format().snapshots().len(), MANY),
        "fill" => (0..MANY).for_each(|_| create(&node)),
        "work" => all_over(&node),
        _ => panic!("unknown work {work}"),
    }
    let seconds = start.elapsed().as_secs_f64();
    drop((graph, node));
    println!("{}", json!({ "seconds": seconds, "peak": peak() }));
}

fn create(node: &Arc<Node>) {
    let new = NewSnapshot { tag: "speed".into(), date_sec: 1, date_nsec: 0, vm_clock_nsec: 0 };
    finish(&mut *node.format().create_snapshot(&new).unwrap());
}

fn finish(change: &mut (impl SnapshotChange + ?Sized)) {
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
}

/// One request in each part of the disk, so that each L2 table is needed in turn.
fn all_over(node: &Node) {
    let mut bytes = vec![0x5a; 4096];
    let step = node.format().size() / REQUESTS;
    for at in (0..REQUESTS).map(|n| n * step) {
        node.read(at, &[ReadBuf::new(&mut bytes)]).unwrap();
        node.write(at, &[WriteBuf::new(&bytes)]).unwrap();
    }
    node.flush().unwrap();
}

/// The most memory this process had, in MiB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

fn table(report: &Report) -> String {
    let mut text =
        String::from("| Large images | ours | qemu-img | times qemu-img |\n|---|---:|---:|---:|\n");
    let cell = |value: Option<f64>, unit: &str, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$} {unit}"))
    };
    for (what, unit, factor, digits) in
        [(CREATE, "s", 1.0, 3), (DELETE, "s", 1.0, 3), (LIST, "ms", 1e3, 1), (OPEN, "ms", 1e3, 1)]
    {
        let value = |who| report.median(what, who, 0).map(|value| value * factor);
        let (ours, theirs) = (value(OURS), value(QEMU));
        let times = ours.zip(theirs).map(|(ours, theirs)| theirs / ours);
        let _ = writeln!(
            text,
            "| {what} | {} | {} | {} |",
            cell(ours, unit, digits),
            cell(theirs, unit, digits),
            cell(times, "", 1).trim()
        );
    }
    let work = format!("{REQUESTS} reads and writes all over the 1 TiB image");
    for what in [CREATE, DELETE, &work] {
        let peak = report.median(&format!("{MEMORY}{what}"), OURS, 0);
        let _ = writeln!(text, "| {MEMORY}{what} | {} | | |", cell(peak, "MiB", 1));
    }
    text
}
