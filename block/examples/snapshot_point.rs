//! What a snapshot of a large disk costs its guest: `snapshot_point DIR SIZE [WRITERS]`.
//!
//! A disk of SIZE (as qemu-img takes it), all allocated, gets three snapshots, of which two are deleted, while
//! threads write 4 KiB anywhere. Says how long the switch and the other steps take, and how long writes take
//! meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a tool for developers")]

use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::{Format, Graph, NewSnapshot, Result, WriteBuf};

/// When a write began, and how long it took.
type Sample = (Instant, Duration);

fn writer(format: &dyn Format, seed: u64, stop: &AtomicBool, samples: &Mutex<Vec<Sample>>) {
    let mut state = seed;
    let mut mine = Vec::new();
    let buf = [7; 4096];
    while !stop.load(Ordering::Acquire) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let start = Instant::now();
        let at = state % (format.size() / 4096) * 4096;
        format.write(at, &[WriteBuf::new(&buf)]).unwrap();
        mine.push((start, start.elapsed()));
        // So that one core can run all: what is looked for is how long one request waits.
        std::thread::sleep(Duration::from_micros(500));
    }
    samples.lock().unwrap().append(&mut mine);
}

/// Runs a step, notes when, and says how long it took.
fn step(name: &str, spans: &mut Vec<(String, Instant, Instant)>, act: impl FnOnce() -> Result<()>) {
    let start = Instant::now();
    act().unwrap();
    let end = Instant::now();
    println!("  {name}: {:.3} ms", (end - start).as_secs_f64() * 1e3);
    spans.push((name.to_owned(), start, end));
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("a directory");
    let size = args.next().expect("a size");
    let writers: u64 = args.next().map_or(2, |n| n.parse().expect("a number"));
    let image = format!("{dir}/snapshot-point.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &image, &size])
        .status()
        .unwrap();
    assert!(made.success());
    let graph = Graph::new();
    let options = format!("driver=qcow2,node-name=d,file.driver=file,file.filename={image}");
    let node = graph.add_text(&options).unwrap();
    let format = node.format();
    let format: &dyn Format = &*format;
    let (stop, samples, mut spans) = (AtomicBool::new(false), Mutex::new(Vec::new()), Vec::new());
    std::thread::scope(|scope| {
        for n in 0..writers {
            let (stop, samples) = (&stop, &samples);
            scope.spawn(move || writer(format, 0x9e37_79b9_7f4a_7c15 ^ n, stop, samples));
        }
        step("idle", &mut spans, || {
            std::thread::sleep(Duration::from_secs(2));
            Ok(())
        });
        for (round, roll_back) in [(1, false), (2, false), (3, true)] {
            println!("snapshot {round}");
            let tag = format!("s{round}");
            let new = NewSnapshot { tag, date_sec: 1, date_nsec: 1, vm_clock_nsec: 1 };
            let mut change = format.create_snapshot(&new).unwrap();
            step(&format!("switch {round}"), &mut spans, || change.switch());
            step(&format!("prepare {round}"), &mut spans, || change.prepare());
            if roll_back {
                step(&format!("rollback {round}"), &mut spans, || change.rollback());
                continue;
            }
            step(&format!("publish {round}"), &mut spans, || change.publish());
            step(&format!("finish {round}"), &mut spans, || change.finish());
            step(&format!("after {round}"), &mut spans, || {
                std::thread::sleep(Duration::from_secs(1));
                Ok(())
            });
        }
        for round in [1, 2] {
            println!("deletion {round}");
            let mut change = format.delete_snapshot(&round.to_string()).unwrap();
            step(&format!("prepare deletion {round}"), &mut spans, || change.prepare());
            step(&format!("publish deletion {round}"), &mut spans, || change.publish());
            step(&format!("finish deletion {round}"), &mut spans, || change.finish());
        }
        stop.store(true, Ordering::Release);
    });
    let samples = samples.into_inner().unwrap();
    println!("writes of 4 KiB: how many, then p50, p99 and the longest in ms");
    for (name, start, end) in spans {
        let within = |(at, took): &&Sample| *at < end && *at + *took > start;
        let mut took: Vec<_> = samples.iter().filter(within).map(|(_, took)| *took).collect();
        took.sort_unstable();
        let at = |permille: usize| {
            let index = (took.len().max(1) - 1) * permille / 1000;
            took.get(index).map_or(0.0, |d| d.as_secs_f64() * 1e3)
        };
        println!("{name}: {}, {:.3} {:.3} {:.3}", took.len(), at(500), at(990), at(1000));
    }
    std::fs::remove_file(&image).unwrap();
}
