//! How fast VM state is written to and read from a fresh image: `vmstate_throughput DIR [MIB]`.
//!
//! Compare with `dd if=/dev/zero of=DIR/x oflag=direct bs=1M conv=fdatasync` on the same disk.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a tool for developers")]

use std::alloc::{Layout, alloc_zeroed};
use std::process::Command;
use std::time::Instant;

use block::{Graph, NewSnapshot, Node, ReadBuf, WriteBuf};

const PART: usize = 4 << 20;
const THREADS: usize = 4;

fn rate(what: &str, bytes: usize, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    println!("{what}: {:.2} s, {:.0} MB/s", seconds, bytes as f64 / 1e6 / seconds);
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("a directory");
    let mib: usize = args.next().map_or(1024, |n| n.parse().expect("MiB"));
    let image = format!("{dir}/vmstate-throughput.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", &image, "8G"])
        .status()
        .unwrap();
    assert!(made.success());
    let len = mib << 20;
    let layout = Layout::from_size_align(len, 4096).unwrap();
    // SAFETY: the layout has a size.
    let start = unsafe { alloc_zeroed(layout) };
    assert!(!start.is_null());
    // SAFETY: the memory is `len` bytes long, set, ours alone and never freed.
    let memory = unsafe { std::slice::from_raw_parts_mut(start, len) };
    for (n, chunk) in memory.chunks_mut(64).enumerate() {
        chunk.fill(n.to_le_bytes()[0] | 1);
    }
    let graph = Graph::new();
    let options = format!("driver=qcow2,node-name=d,file.driver=file,file.filename={image}");
    let node = graph.add_text(&options).unwrap();
    for round in 0..3 {
        save(&node, memory, round);
        let id = node.format().snapshots()[0].id.clone();
        load(&node, &id, memory, round);
        delete(&node, &id, len, round);
    }
    drop(node);
    drop(graph);
    std::fs::remove_file(&image).unwrap();
}

fn save(node: &Node, memory: &[u8], round: usize) {
    let new = NewSnapshot { tag: "x".into(), date_sec: 1, date_nsec: 1, vm_clock_nsec: 1 };
    let start = Instant::now();
    let format = node.format();
    let mut change = format.create_snapshot(&new).unwrap();
    let writer = &*change;
    let parts: Vec<_> = memory.chunks(PART).enumerate().collect();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let parts = &parts;
            scope.spawn(move || {
                for (n, part) in parts.iter().skip(thread).step_by(THREADS) {
                    let at = (n * PART) as u64;
                    writer.write_vmstate(at, &[WriteBuf::new(part)]).unwrap();
                }
            });
        }
    });
    rate("  data", memory.len(), start);
    change.set_vmstate_size(memory.len() as u64);
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
    drop(change);
    rate(&format!("save {round}"), memory.len(), start);
}

fn load(node: &Node, id: &str, memory: &mut [u8], round: usize) {
    let len = memory.len();
    let start = Instant::now();
    let format = node.format();
    let state = format.open_vmstate(id).unwrap();
    let reader = &*state;
    std::thread::scope(|scope| {
        let mut rest = memory.chunks_mut(PART).enumerate().collect::<Vec<_>>();
        for _ in 0..THREADS {
            let mine = rest.split_off(rest.len() - rest.len().min(len / PART / THREADS));
            scope.spawn(move || {
                for (n, part) in mine {
                    reader.read((n * PART) as u64, &[ReadBuf::new(part)]).unwrap();
                }
            });
        }
    });
    drop(state);
    rate(&format!("load {round}"), len, start);
}

fn delete(node: &Node, id: &str, len: usize, round: usize) {
    let start = Instant::now();
    let format = node.format();
    let mut change = format.delete_snapshot(id).unwrap();
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
    rate(&format!("delete {round}"), len, start);
}
