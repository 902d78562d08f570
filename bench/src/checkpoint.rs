//! Save and load of a bare-metal guest whose RAM is full of words that are all different.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use tardigrade_tests::baremetal::layout::{FREE, HIGH_RAM, LOW_RAM_MAX};
use tardigrade_tests::baremetal::{Monitor, image};
use tardigrade_tests::disk::qemu_img;

use crate::program::{Machine, Program};
use crate::report::Report;

const MIB: u64 = 1 << 20;

/// RAM that the guest has and does not use, in MiB.
const UNUSED: u64 = 128;

/// What is left to QEMU's firmware, in bytes.
const FIRMWARE: u64 = 16 * MIB;

/// The seed of the pattern in memory.
const SEED: u64 = 0x7461_7264;

/// One round: a machine that is filled, saved and loaded, and one that is revived.
pub(crate) fn measure(program: Program, used: u64, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let command = || program.command(&kernel, used + UNUSED);
    let ranges = used_ranges(used);
    let mut add = |what: &str, value| report.add(what, program.name(), used, value);

    let mut machine = Machine::start(program, command(), &disk, dir);
    let mut guest = machine.monitor();
    for range in ranges.clone() {
        guest.fill(range, SEED);
    }
    let ticks = ticks_per_ms(&mut guest);
    let idle = guest.watch(|| std::thread::sleep(Duration::from_millis(200)));
    add("idle gap ms", idle as f64 / ticks);
    let mut saved = Duration::ZERO;
    let gap = guest.watch(|| {
        // Until the guest has the whole request: what is saved is to be a guest that watches.
        std::thread::sleep(Duration::from_millis(300));
        saved = machine.job("snapshot-save", "bench");
    });
    add("save s", saved.as_secs_f64());
    add("pause ms", gap as f64 / ticks);

    // A guest that has not written would only be put back, which `rewind` measures.
    for range in ranges.clone() {
        guest.fill(range, SEED + 1);
    }
    forget_cached(&disk);
    let start = Instant::now();
    let loaded = machine.job("snapshot-load", "bench");
    add("load s", loaded.as_secs_f64());
    // What runs now is what was saved: a guest that watches the time.
    guest.end_watch();
    add("load answer ms", start.elapsed().as_secs_f64() * 1e3);
    check(&mut guest, &ranges);
    add("load look s", look_at_all(&mut guest, &ranges, start).as_secs_f64());
    let again = look_at_all(&mut guest, &ranges, Instant::now());
    add("look s", again.as_secs_f64());
    machine.quit();

    forget_cached(&disk);
    let start = Instant::now();
    let mut revive = command();
    revive.args(["--loadvm", "bench"]);
    let machine = Machine::start(program, revive, &disk, dir);
    let mut guest = Monitor::connect(machine.serial_path());
    guest.end_watch();
    add("revive s", start.elapsed().as_secs_f64());
    check(&mut guest, &ranges);
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

/// Where the guest has so many MiB to fill. QEMU's firmware has its own structures at the end of low
/// RAM, among them the queue of the disk: they stay.
pub(crate) fn used_ranges(used: u64) -> Vec<Range<u64>> {
    let low_end = LOW_RAM_MAX - FIRMWARE;
    let end = FREE + used * MIB;
    let above = end.saturating_sub(low_end);
    let parts = [FREE..end.min(low_end), HIGH_RAM..HIGH_RAM + above];
    parts.into_iter().filter(|range| !range.is_empty()).collect()
}

/// Lets the guest look at every word it has in use; the time since `start`.
fn look_at_all(guest: &mut Monitor, ranges: &[Range<u64>], start: Instant) -> Duration {
    for range in ranges {
        guest.verify(range.clone(), SEED);
    }
    start.elapsed()
}

/// The first and the last MiB of each range must be there.
fn check(guest: &mut Monitor, ranges: &[Range<u64>]) {
    for range in ranges {
        guest.verify(range.start..range.start + MIB, SEED);
        guest.verify(range.end - MIB..range.end, SEED);
    }
}

pub(crate) fn ticks_per_ms(guest: &mut Monitor) -> f64 {
    let (start, tsc) = (Instant::now(), guest.tsc());
    std::thread::sleep(Duration::from_millis(100));
    (guest.tsc() - tsc) as f64 / start.elapsed().as_secs_f64() / 1e3
}

/// Takes the image out of the host's page cache, so that a load reads the disk.
pub(crate) fn forget_cached(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: the descriptor is open; the advice changes no contents.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(error, 0);
}
