//! The block engine through NBD, beside `qemu-storage-daemon` with io_uring: the same client, the
//! same images, the same options.

mod alone;
mod client;
mod daemon;
mod socket;

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::images::{CLUSTER, DISK, Images, Kind, Numbers};
use crate::report::Report;
use crate::settle;

use client::{Client, Direction};
use daemon::Daemon;
use socket::Wait;

/// Rounds; the report tells medians.
const ROUNDS: usize = 5;
/// How long requests that can go on for ever do so.
const DURATION: Duration = Duration::from_secs(1);
/// Bytes that a sequential load allocates at most: below what makes a host write its page cache out.
const WRITTEN: u64 = 1 << 30;

const OURS: &str = "Tardigrade";
const QSD: &str = "QEMU storage daemon";
const ALONE: &str = "no disk";

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
    /// How the client waits. With one request in flight it would sleep and wake for each, which costs
    /// more than the request and is the same for both servers.
    wait: Wait,
}

const fn load(
    name: &'static str,
    direction: Direction,
    len: u32,
    depth: usize,
    random: bool,
) -> Load {
    let wait = if depth == 1 { Wait::Poll } else { Wait::Sleep };
    Load { name, direction, len, depth, random, wait }
}

/// A load whose client sleeps for each reply.
const fn sleeping(load: Load, name: &'static str) -> Load {
    Load { name, wait: Wait::Sleep, ..load }
}

const LOADS: [Load; 10] = [
    load("4 KiB random read, depth 1", Direction::Read, 4 << 10, 1, true),
    sleeping(
        load("", Direction::Read, 4 << 10, 1, true),
        "4 KiB random read, depth 1, client sleeps",
    ),
    load("4 KiB random read, depth 32", Direction::Read, 4 << 10, 32, true),
    load("64 KiB sequential read, depth 8", Direction::Read, 64 << 10, 8, false),
    load("1 MiB sequential read, depth 8", Direction::Read, 1 << 20, 8, false),
    load("4 KiB random write, depth 1", Direction::Write, 4 << 10, 1, true),
    sleeping(
        load("", Direction::Write, 4 << 10, 1, true),
        "4 KiB random write, depth 1, client sleeps",
    ),
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
            // Whoever comes second may find the machine otherwise than the first left it.
            let mut order: Vec<_> = servers.iter().collect();
            order.rotate_left(round % servers.len());
            if load.depth == 1 {
                report.add(&title(*kind, load), ALONE, DISK >> 20, without_disk(&images, load));
            }
            for server in order {
                let rate = once(server, &images, *kind, load, report);
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
fn once(server: &Daemon, images: &Images, kind: Kind, load: &Load, report: &mut Report) -> f64 {
    let image = images.fresh(kind);
    image.files().for_each(settle::warm);
    if !settle::settle(images.dir()) {
        report.note_once("Others wrote to the disk during the measurements.");
    }
    let running = server.start(&image);
    let mut client = running.connect();
    let allocates = kind != Kind::Full && load.direction == Direction::Write;
    if load.direction == Direction::Read {
        // The server's own tables too.
        let all = (0..client.size()).step_by(1 << 20);
        client.run(Direction::Read, all, 1 << 20, 4, Wait::Sleep);
    }
    let slots = client.size() / u64::from(load.len);
    let most = allocates.then(|| {
        if load.random { images.clusters(kind) } else { slots.min(WRITTEN / u64::from(load.len)) }
    });
    if let Some(most) = most {
        // Over a backing file whole clusters are written.
        let least = if kind == Kind::Overlay { CLUSTER } else { 0 };
        settle::back_memory(images.dir(), most * u64::from(load.len).max(least));
    }
    let rate = drive(&mut client, load, most, |n| images.shuffled_cluster(kind, n));
    client.flush();
    drop(client);
    running.stop();
    rate
}

/// Requests per second, of `most` requests at most that each find a new place, or for a while.
fn drive(
    client: &mut Client,
    load: &Load,
    most: Option<u64>,
    new_place: impl Fn(u64) -> u64,
) -> f64 {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let slots = client.size() / u64::from(load.len);
    let mut count = 0u64;
    let start = Instant::now();
    let offsets = std::iter::from_fn(|| {
        if most.map_or_else(|| start.elapsed() >= DURATION, |most| count >= most) {
            return None;
        }
        count += 1;
        Some(match (load.random, most) {
            (true, Some(_)) => new_place(count - 1),
            (true, None) => numbers.next() % slots * u64::from(load.len),
            (false, _) => (count - 1) % slots * u64::from(load.len),
        })
    });
    client.run(load.direction, offsets, load.len, load.depth, load.wait);
    count as f64 / start.elapsed().as_secs_f64()
}

/// Requests per second that the client and the socket reach alone.
fn without_disk(images: &Images, load: &Load) -> f64 {
    let path = images.dir().join("alone");
    let _ = std::fs::remove_file(&path);
    std::thread::scope(|scope| {
        scope.spawn(|| alone::serve(&path, DISK));
        let mut client = loop {
            match Client::connect(&path, "") {
                Ok(client) => break client,
                Err(_) => std::thread::yield_now(),
            }
        };
        drive(&mut client, load, None, |n| n)
    })
}

fn table(report: &Report, titles: &[String]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| Block engine through NBD: requests per second | ours | {QSD} | times | of the rounds | {ALONE} |\n|---|---:|---:|---:|---:|---:|"
    );
    for title in titles {
        let alone = report.median(title, ALONE, DISK >> 20);
        let alone = alone.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"));
        let _ = writeln!(text, "{} {alone} |", report.compared(title, title, OURS, QSD));
    }
    let _ = writeln!(text);
    text
}
