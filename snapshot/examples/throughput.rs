//! Save and load throughput on a real disk, beside `dd` with direct I/O on the same disk.
//!
//! `cargo run --release -p snapshot --example throughput -- DIRECTORY [MIB [THREADS [ROUNDS [METHOD [FILE]]]]]`
//!
//! RAM is full of noise, or of the bytes of `FILE` again and again; it is compressed by `METHOD`: none, zlib or
//! zstd.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use block::graph::Graph;
use block::qcow2::Compression;
use block::{Node, Progress};
use snapshot::{Checkpoint, GuestMemory, MachineConfig, SaveRequest, Section, Stamp, delete, save};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .ok_or("usage: throughput DIRECTORY [MIB [THREADS [ROUNDS [METHOD [FILE]]]]]")?;
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |n| n.parse());
    let (mib, threads, rounds) = (number(1024)?, number(4)?, number(3)?);
    let compress = match arguments.next().as_deref() {
        None | Some("none") => None,
        Some("zlib") => Some(Compression::Zlib),
        Some("zstd") => Some(Compression::Zstd),
        Some(other) => return Err(format!("no method '{other}'").into()),
    };
    let contents = arguments.next().map(std::fs::read).transpose()?;

    let directory = Path::new(&directory);
    let image = directory.join("throughput.qcow2");
    let image = image.to_str().ok_or("the directory's name is not UTF-8")?;
    let method = format!("compression_type={}", compress.unwrap_or(Compression::Zlib));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &method, image, "64G"])?;
    let graph = Graph::new();
    let options = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={image}");
    let nodes = vec![graph.add_text(&options)?];

    let ram = memory(mib)?;
    match &contents {
        Some(bytes) => repeat(&ram, mib, bytes)?,
        None => fill(&ram, mib)?,
    }
    for round in 1..=rounds {
        let dd = dd(directory, mib, "of")?;
        report(round, "dd, write", mib, dd);
        let tag = format!("t{round}");
        let begun = Instant::now();
        let written = save_ram(&nodes, &ram, &tag, threads, compress)?;
        report(round, "save", mib, begun.elapsed());
        println!("round {round}: {:20} {:8.1} MiB", "  written", written as f64 / (1 << 20) as f64);

        let dd = self::dd(directory, mib, "if")?;
        report(round, "dd, read", mib, dd);
        let fresh = memory(mib)?;
        report(round, "load, fresh RAM", mib, load(&nodes, &fresh, &tag, true, threads)?);
        report(round, "load, used RAM", mib, load(&nodes, &ram, &tag, false, threads)?);
        delete(&nodes, &tag)?;
    }
    drop((nodes, graph));
    run("qemu-img", &["check", "-q", image])?;
    std::fs::remove_file(image)?;
    Ok(())
}

fn memory(mib: usize) -> Result<GuestMemory, Failure> {
    Ok(GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)])?)
}

/// No two pages alike and none zero.
fn fill(ram: &GuestMemory, mib: usize) -> Result<(), Failure> {
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut page = vec![0; 4096];
    for at in (0..mib << 20).step_by(4096) {
        for bytes in page.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        ram.write_slice(&page, GuestAddress(at as u64))?;
    }
    Ok(())
}

/// The bytes of a file again and again.
fn repeat(ram: &GuestMemory, mib: usize, bytes: &[u8]) -> Result<(), Failure> {
    for at in (0..mib << 20).step_by(bytes.len().max(1)) {
        let len = bytes.len().min((mib << 20) - at);
        ram.write_slice(&bytes[..len], GuestAddress(at as u64))?;
    }
    Ok(())
}

fn save_ram(
    nodes: &[Arc<Node>],
    ram: &GuestMemory,
    tag: &str,
    threads: usize,
    compress: Option<Compression>,
) -> Result<u64, Failure> {
    let report = save(SaveRequest {
        nodes,
        vmstate: "d0",
        stamp: Stamp { tag: tag.to_owned(), date_sec: 0, date_nsec: 0, vm_clock_nsec: 0 },
        about: snapshot::About::default(),
        compress,
        config: &MachineConfig::default(),
        sections: vec![Section::encode("vcpu", 0, 1, &0)?],
        ram,
        progress: &Progress::default(),
        threads,
    })?;
    Ok(report.bytes_written)
}

fn load(
    nodes: &[Arc<Node>],
    ram: &GuestMemory,
    tag: &str,
    fresh: bool,
    threads: usize,
) -> Result<Duration, Failure> {
    let begun = Instant::now();
    let checkpoint = Checkpoint::open(nodes, "d0", tag)?;
    checkpoint.read_ram(ram, fresh, threads, &Progress::default())?;
    Ok(begun.elapsed())
}

/// Writes (`of`) or reads (`if`) as many bytes with one `dd` in 4 MiB requests.
fn dd(directory: &Path, mib: usize, side: &str) -> Result<Duration, Failure> {
    let file = directory.join("throughput.dd");
    let file = format!("{side}={}", file.display());
    let count = format!("count={}", mib / 4);
    let write = ["if=/dev/zero", "oflag=direct", "conv=fsync"];
    let read = ["of=/dev/null", "iflag=direct"];
    let flags = if side == "of" { &write[..] } else { &read[..] };
    let begun = Instant::now();
    run("dd", &[&[file.as_str(), &count, "bs=4M", "status=none"], flags].concat())?;
    Ok(begun.elapsed())
}

fn run(program: &str, arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new(program).args(arguments).status()?;
    status.success().then_some(()).ok_or_else(|| format!("{program} failed").into())
}

fn report(round: usize, what: &str, mib: usize, time: Duration) {
    let rate = mib as f64 / time.as_secs_f64();
    println!("{round}  {what:<16} {:>8.1} ms {rate:>8.0} MiB/s", time.as_secs_f64() * 1e3);
}
