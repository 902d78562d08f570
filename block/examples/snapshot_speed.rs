//! How long snapshots of an image take, and how much memory: `snapshot_speed IMAGE [ROUNDS]`. Opens the
//! image, makes a snapshot without VM state and deletes it again; prints seconds and KiB.
#![allow(clippy::unwrap_used, clippy::panic, reason = "an example may fail")]

use std::time::Instant;

use block::{Format, Graph, NewSnapshot, SnapshotChange};
use serde_json::json;

/// Runs a change to its end.
fn run(change: &mut (impl SnapshotChange + ?Sized)) {
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
}

/// The most memory the process had, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn main() {
    let mut args = std::env::args().skip(1);
    let image = args.next().unwrap_or_else(|| panic!("usage: snapshot_speed IMAGE [ROUNDS]"));
    let rounds = args.next().map_or(1, |n| n.parse().unwrap());
    let graph = Graph::new();
    let start = Instant::now();
    let file = json!({ "driver": "file", "filename": image });
    let node = graph
        .add(&json!({ "driver": "qcow2", "node-name": "d", "discard": "unmap", "file": file }))
        .unwrap();
    println!("open {:.4} peak {}", start.elapsed().as_secs_f64(), peak());
    for _ in 0..rounds {
        let format = node.format();
        let new = NewSnapshot { tag: "speed".into(), date_sec: 1, date_nsec: 0, vm_clock_nsec: 0 };
        let start = Instant::now();
        run(&mut *format.create_snapshot(&new).unwrap());
        println!("create {:.4} peak {}", start.elapsed().as_secs_f64(), peak());
        let id = format.snapshots().last().unwrap().id.clone();
        let start = Instant::now();
        run(&mut *format.delete_snapshot(&id).unwrap());
        println!("delete {:.4} peak {}", start.elapsed().as_secs_f64(), peak());
    }
}
