//! Going back to one checkpoint again and again, as a fuzzer does, through QMP.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use tardigrade_tests::baremetal::image;
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::disk::qemu_img;

use crate::program::{Machine, Program};
use crate::report::Report;

const MIB: u64 = 1 << 20;

/// RAM of the guest in MiB.
const SIZES: &[u64] = &[256, 4096];

/// How long loads are repeated.
const TIME: Duration = Duration::from_secs(5);

/// A guest that fills memory at CPL 3 without an end, and is taken back to its beginning. It dirties
/// as much as it gets to between two loads.
///
/// Of QEMU there is the time of a load in the table of checkpoints: it has no cheaper way back, and
/// does not come to an end with this guest.
pub(crate) fn measure(programs: &[Program], dir: &Path, report: &mut Report) {
    let programs: Vec<_> = programs.iter().filter(|&&one| one == Program::Tardigrade).collect();
    for &ram in SIZES {
        for program in &programs {
            eprintln!("{} goes back, {ram} MiB of RAM", program.name());
            loads(**program, ram, dir, report);
        }
    }
    let names: Vec<_> = programs.iter().map(|program| program.name()).collect();
    report.section(move |report| {
        let mut text = String::from(
            "| Load of the same checkpoint again and again | loads a second | MiB dirtied between loads |\n\
             |---|---:|---:|\n",
        );
        for name in &names {
            for &ram in SIZES {
                let value = |what, digits| {
                    let value = report.median(what, name, ram);
                    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
                };
                let (rate, dirty) = (value("loads a second", 1), value("dirty MiB", 2));
                let _ = writeln!(text, "| {name}, {ram} MiB of RAM | {rate} | {dirty} |");
            }
        }
        text + "\n"
    });
}

fn loads(program: Program, ram: u64, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let mut machine = Machine::start(program, program.command(&kernel, ram), &disk, dir);
    let mut guest = machine.monitor();
    // Small, or QEMU would not come to a second load in the time; and never at its end in it.
    let used = FREE..200 * MIB;
    guest.fill(used.clone(), 1);
    guest.start_fill(used, 2);
    machine.job("snapshot-save", "bench");
    machine.job("snapshot-load", "bench");
    machine.job("snapshot-load", "bench");
    let before = machine.rewound();
    let (start, mut count) = (Instant::now(), 0);
    let mut qmp = machine.connect();
    while start.elapsed() < TIME {
        machine.job_on(&mut qmp, "snapshot-load", "bench");
        count += 1;
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    report.add("loads a second", program.name(), ram, rate);
    if let Some((before, after)) = before.zip(machine.rewound()) {
        let each = (after - before) as f64 / f64::from(count) / MIB as f64;
        report.add("dirty MiB", program.name(), ram, each);
    }
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}
