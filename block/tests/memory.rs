//! What a large disk takes of memory. A test binary of its own, because it looks at the whole process.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::process::Command;
use std::sync::Arc;

use block::qcow2::{Probe, Qcow2};
use block::storage::{FileOptions, FileStorage};
use block::{Format, ReadBuf, WriteBuf};

/// Most memory that the process had so far, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// All clusters allocated, requests everywhere, default options.
#[test]
fn a_disk_of_one_tebibyte_takes_less_than_64_mib() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]).arg(&image);
    match create.arg("1T").status() {
        Ok(status) => assert!(status.success(), "{status}"),
        Err(_) => {
            eprintln!("SKIPPED: qemu-img is not installed (apt-get install qemu-utils)");
            return;
        }
    }
    let before = peak();
    let storage = Arc::new(FileStorage::open(&image, FileOptions::default()).unwrap());
    let format = Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap();
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut buf = vec![0; 4096];
    for n in 0..20_000u64 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % (1 << 28) * 4096;
        if n % 8 == 0 {
            format.write(at, &[WriteBuf::new(&buf)]).unwrap();
        } else {
            format.read(at, &[ReadBuf::new(&mut buf)]).unwrap();
        }
        if n % 50 == 0 {
            // Tables of entries change: zero clusters.
            format.write_zeroes(at / 65536 * 65536, 65536, true).unwrap();
        }
    }
    format.flush().unwrap();
    let taken = peak() - before;
    println!("{taken} KiB");
    assert!(taken < 64 << 10, "{taken} KiB");
}
