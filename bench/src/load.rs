//! How long a lazy load keeps the guest standing, whatever its RAM and however many disks it takes back.
//!
//! Before each load all of RAM in use is written, and each disk, so that nothing is only put back. The checkpoint
//! is of a guest that waits for a byte at its serial port, and answers it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qmp::client::Client;
use serde_json::json;

use crate::checkpoint::{forget_cached, used_ranges};
use crate::group;
use crate::program::{PATIENCE, Program};
use crate::report::{Report, number};
use crate::speed::{since_epoch, time_of};

/// RAM in use, in MiB.
const SIZES: &[u64] = &[256, 1024, 4096];
const DISKS: &[usize] = &[1, 4, 8];
/// Loads of each machine.
const LOADS: usize = 7;

const PAUSE: &str = "STOP to RESUME";
const TOTAL: &str = "command to RESUME";
const ANSWER: &str = "STOP to answer";

fn what(name: &str, disks: usize) -> String {
    format!("load {name}, disks: {disks}")
}

/// Measures all sizes, and adds the table.
pub(crate) fn measure(sizes: &[String], dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let given: Vec<u64> = sizes.iter().filter_map(|size| size.parse().ok()).collect();
    for used in if given.is_empty() { SIZES.to_vec() } else { given } {
        for disks in DISKS {
            eprintln!("pause of a load, {used} MiB, disks: {disks}");
            one(*disks, used, dir, report);
        }
    }
    report.section(table);
}

fn one(count: usize, used: u64, dir: &Path, report: &mut Report) {
    let disks: Vec<PathBuf> = (0..count).map(|n| group::make_disk(dir, n)).collect();
    let mut machine = group::start(Program::Tardigrade, &disks, used, dir);
    let mut guest = machine.monitor();
    for range in used_ranges(used) {
        guest.fill(range, 1);
    }
    let mut qmp = machine.connect();
    guest.watch(|| {
        // Until the guest has the whole request.
        std::thread::sleep(Duration::from_millis(300));
        machine.job_on(&mut qmp, "snapshot-save", "bench");
    });
    for _ in 0..LOADS {
        for range in used_ranges(used) {
            guest.fill(range, 2);
        }
        for (n, disk) in disks.iter().enumerate() {
            write(&mut qmp, n);
            forget_cached(disk);
        }
        qmp.take_events();
        let asked = since_epoch();
        machine.job_on(&mut qmp, "snapshot-load", "bench");
        let events = qmp.take_events();
        let (stopped, resumed) = (time_of(&events, "STOP"), time_of(&events, "RESUME"));
        guest.end_watch();
        let answered = since_epoch();
        wait_until_read(&mut qmp);
        let mut add =
            |name, value| report.add(&what(name, count), Program::Tardigrade.name(), used, value);
        add(PAUSE, resumed - stopped);
        add(TOTAL, resumed - asked);
        add(ANSWER, answered - stopped);
    }
    machine.quit();
    disks.iter().for_each(|disk| std::fs::remove_file(disk).unwrap());
}

/// Writes to a disk of the machine.
fn write(qmp: &mut Client, disk: usize) {
    let line = format!("qemu-io disk{disk} \"write -q -P 1 0 1M\"");
    let told = qmp.execute("human-monitor-command", json!({ "command-line": line })).unwrap();
    assert_eq!(told, "", "{line}");
}

fn wait_until_read(qmp: &mut Client) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let told = qmp.execute("x-query-load", json!({})).unwrap();
        assert_eq!(told["rewinds"], 0, "the guest was only put back");
        if told["missing"] == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "RAM is not read: {told}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn table(report: &Report) -> String {
    let mut text = String::from(
        "| Lazy load: RAM in use | disks | STOP to RESUME, ms, median | longest | command to RESUME, ms, median | longest | \
         STOP to the guest's answer, ms, median | longest |\n|---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for used in report.sizes(&what(PAUSE, DISKS[0])) {
        for disks in DISKS {
            let part = |name, part| {
                let name = what(name, *disks);
                number(report.quantile(&name, Program::Tardigrade.name(), used, part), 1)
            };
            let _ = write!(text, "| {used} MiB | {disks} |");
            for name in [PAUSE, TOTAL, ANSWER] {
                let _ = write!(text, " {} | {} |", part(name, 0.5), part(name, 1.0));
            }
            text.push('\n');
        }
    }
    text + "\n"
}
