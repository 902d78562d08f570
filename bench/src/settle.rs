//! The same start for every measurement: nothing that was written before is still on its way to the
//! disk, and what is read is in the page cache.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for writing that others may be going on with.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes on their way to the disk that do not matter.
const QUIET: u64 = 1 << 20;

/// Writes everything out that the file system of `dir` has in memory, and waits until the host writes no
/// more. Says whether that came.
pub(crate) fn settle(dir: &Path) -> bool {
    let root = File::open(dir).unwrap();
    // SAFETY: no memory is passed; the descriptor is open.
    assert_eq!(unsafe { libc::syncfs(root.as_raw_fd()) }, 0, "{}", std::io::Error::last_os_error());
    let deadline = Instant::now() + PATIENCE;
    while writing() > QUIET {
        if Instant::now() > deadline {
            return false;
        }
        // Nothing tells of it; this is before the clock runs.
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Bytes that are being written to disks.
fn writing() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Writeback:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib << 10
}

/// Reads a file, so that the page cache has it.
pub(crate) fn warm(path: &Path) {
    let mut file = File::open(path).unwrap();
    let mut buf = vec![0; 1 << 20];
    while file.read(&mut buf).unwrap() > 0 {}
}

/// Has the host back memory that a measurement's writes will take from the page cache, by taking and
/// leaving as much just before: the host of a virtual machine may have got free memory back, and hands
/// it out page by page at many times the cost of the write.
pub(crate) fn back_memory(dir: &Path, bytes: u64) {
    let mut scratch = tempfile::tempfile_in(dir).unwrap();
    let part = vec![1; 64 << 10];
    let mut left = bytes + bytes / 4;
    // Never to reach the disk: the file has no name, and is gone before anybody writes it out.
    while left > 0 {
        scratch.write_all(&part).unwrap();
        left = left.saturating_sub(part.len() as u64);
    }
}
