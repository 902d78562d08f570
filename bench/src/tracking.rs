//! What dirty tracking costs a guest between two checkpoints: the same work with it and without.
//!
//! After a save every page is write-protected once, so that the first write to each has a fault; from then on
//! the guest runs as it would without. The work is a loop in user mode that writes to all of a part of memory, again and
//! again, for seconds: as long as lies between two checkpoints of a machine that is not saved all the time.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use tardigrade_tests::baremetal::image;
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::disk::qemu_img;

use crate::ROUNDS;
use crate::program::{Machine, Program};
use crate::report::{Report, number};

const MIB: u64 = 1 << 20;
const RAM: u64 = 256;
/// What the guest writes to.
const WORK: Range<u64> = FREE..FREE + 64 * MIB;
/// How long it works, for each number.
const TIME: Duration = Duration::from_secs(10);
const WHAT: &str = "passes a second after a save";
const MODES: [(&str, &str); 2] =
    [("tracking on", "microvm"), ("tracking off", "microvm,dirty-tracking=off")];

/// Measures both by turns, and adds the table.
pub(crate) fn measure(dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    for round in 0..ROUNDS {
        for (name, machine) in MODES {
            eprintln!("{name}, round {}", round + 1);
            one(name, machine, dir, report);
        }
    }
    report.section(table);
}

fn one(name: &str, machine: &str, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let mut command = Program::Tardigrade.command(&kernel, RAM);
    command.args(["--machine", machine]);
    let mut machine = Machine::start(Program::Tardigrade, command, &disk, dir);
    let mut guest = machine.monitor();
    guest.fill(WORK, 1);
    machine.job("snapshot-save", "bench");
    let (start, mut passes) = (Instant::now(), 0);
    while start.elapsed() < TIME {
        guest.fill(WORK, passes);
        passes += 1;
    }
    report.add(WHAT, name, RAM, passes as f64 / start.elapsed().as_secs_f64());
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

fn table(report: &Report) -> String {
    let mut text = String::from(
        "| Between two checkpoints: a guest that writes 64 MiB again and again for 10 s | passes a second, median |\n\
         |---|---:|\n",
    );
    let rate = |name| report.median(WHAT, name, RAM);
    for (name, _) in MODES {
        let _ = writeln!(text, "| {name} | {} |", number(rate(name), 1));
    }
    let [(on, _), (off, _)] = MODES;
    let cost = rate(on).zip(rate(off)).map(|(on, off)| (1.0 - on / off) * 100.0);
    let _ = writeln!(text, "| cost of tracking, % | {} |", number(cost, 1));
    text + "\n"
}
