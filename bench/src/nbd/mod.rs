//! The block engine through NBD, beside `qemu-storage-daemon` with io_uring: the same client, the
//! same images, the same options.

mod client;
mod daemon;
mod images;

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use crate::report::Report;

use client::Direction;
use daemon::Daemon;
use images::{Images, Kind};

/// Rounds; the report tells medians.
const ROUNDS: usize = 3;
/// How long requests that can go on for ever do so, in seconds.
const SECONDS: f64 = 1.0;
/// Bytes of each image's disk.
const DISK: u64 = 512 << 20;

const OURS: &str = "Tardigrade";
const QSD: &str = "QEMU storage daemon";

/// A pattern of requests.
#[derive(Debug, Clone, Copy)]
struct Load {
    name: &'static str,
    direction: Direction,
    /// Bytes of a request.
    len: u32,
    /// Requests in flight.
    depth: usize,
    random: bool,
}

const fn load(
    name: &'static str,
    direction: Direction,
    len: u32,
    depth: usize,
    random: bool,
) -> Load {
    Load { name, direction, len, depth, random }
}

const LOADS: [Load; 8] = [
    load("4 KiB random read, depth 1", Direction::Read, 4 << 10, 1, true),
    load("4 KiB random read, depth 32", Direction::Read, 4 << 10, 32, true),
    load("64 KiB sequential read, depth 8", Direction::Read, 64 << 10, 8, false),
    load("1 MiB sequential read, depth 8", Direction::Read, 1 << 20, 8, false),
    load("4 KiB random write, depth 1", Direction::Write, 4 << 10, 1, true),
    load("4 KiB random write, depth 32", Direction::Write, 4 << 10, 32, true),
    load("64 KiB sequential write, depth 8", Direction::Write, 64 << 10, 8, false),
    load("1 MiB sequential write, depth 8", Direction::Write, 1 << 20, 8, false),
];

/// Measures everything whose name contains `filter`.
pub(crate) fn measure(dir: &Path, filter: &str, report: &mut Report) {
    let servers = daemon::installed(report);
    let images = Images::make(dir);
    let cases: Vec<_> = Kind::ALL
        .iter()
        .flat_map(|kind| LOADS.iter().map(move |load| (*kind, *load)))
        // Nothing is read that nobody wrote.
        .filter(|(kind, load)| *kind != Kind::Empty || load.direction == Direction::Write)
        .filter(|(kind, load)| title(*kind, load).contains(filter))
        .collect();
    for round in 0..ROUNDS {
        for (kind, load) in &cases {
            for server in &servers {
                let rate = once(server, &images, *kind, load);
                report.add(&title(*kind, load), server.name(), DISK >> 20, rate);
                eprintln!(
                    "{}, {}, round {}: {rate:.0}/s",
                    title(*kind, load),
                    server.name(),
                    round + 1
                );
            }
        }
    }
    let titles: Vec<_> = cases.iter().map(|(kind, load)| title(*kind, load)).collect();
    report.section(move |report| table(report, &titles));
}

fn title(kind: Kind, load: &Load) -> String {
    format!("{}: {}", kind.name(), load.name)
}

/// Requests per second.
fn once(server: &Daemon, images: &Images, kind: Kind, load: &Load) -> f64 {
    let image = images.fresh(kind);
    let running = server.start(&image);
    let mut client = running.connect();
    // A warm cache, for both.
    let allocates = kind != Kind::Full && load.direction == Direction::Write;
    if load.direction == Direction::Read {
        client.run(Direction::Read, (0..DISK).step_by(1 << 20), 1 << 20, 4);
    }
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let slots = client.size() / u64::from(load.len);
    let (mut count, mut next) = (0u64, 0u64);
    let start = Instant::now();
    let mut step = |batch: u64| {
        let offsets: Vec<u64> = (0..batch)
            .map(|_| {
                next += 1;
                match (load.random, allocates) {
                    // Each cluster once: every write finds a new one.
                    (true, true) => images.shuffled_cluster(next - 1),
                    (true, false) => numbers.next() % slots * u64::from(load.len),
                    (false, _) => (next - 1) % slots * u64::from(load.len),
                }
            })
            .collect();
        client.run(load.direction, offsets, load.len, load.depth);
        count += batch;
    };
    if allocates {
        step(if load.random { images.clusters() } else { slots });
    } else {
        let batch = (16 << 20) / u64::from(load.len);
        while start.elapsed().as_secs_f64() < SECONDS {
            step(batch);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    client.flush();
    drop(client);
    running.stop();
    count as f64 / seconds
}

/// Pseudo-random numbers, the same in every run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn table(report: &Report, titles: &[String]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| Block engine through NBD: requests per second | ours | {QSD} | times |\n|---|---:|---:|---:|"
    );
    for title in titles {
        let ours = report.median(title, OURS, DISK >> 20);
        let theirs = report.median(title, QSD, DISK >> 20);
        let number = |value: Option<f64>, digits| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let times = ours.zip(theirs).map(|(ours, theirs)| ours / theirs);
        let (ours, theirs, times) = (number(ours, 0), number(theirs, 0), number(times, 2));
        let _ = writeln!(text, "| {title} | {ours} | {theirs} | {times} |");
    }
    let _ = writeln!(text);
    text
}
