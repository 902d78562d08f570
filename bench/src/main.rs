//! `make bench`: checkpoints and start of Tardigrade, beside QEMU and beside the disk itself, all in
//! one run. `docs/benchmarks.md` says what is measured and how.
//!
//! Prints a Markdown report and writes it to `target/bench/report.md`, with every single
//! measurement in `report.json` beside it. Arguments are the sizes of used RAM in MiB, if not the
//! usual ones; or `nbd` or `queue` and a part of a name, for such measurements of the block engine
//! only; or `snapshots`, `forks`, `tracking` or `group`; or `machines`, `rewind`, `live`, `load` or
//! `speed` and sizes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark may fail")]
#![allow(clippy::cast_precision_loss, reason = "numbers for people")]

mod checkpoint;
mod disk;
mod forks;
mod group;
mod images;
mod live;
mod load;
mod nbd;
mod program;
mod queue;
mod report;
mod rewind;
mod settle;
mod snapshots;
mod speed;
mod start;
mod tracking;

use std::path::{Path, PathBuf};

use program::Program;
use report::Report;

/// Used RAM in MiB.
pub(crate) const SIZES: &[u64] = &[256, 1024, 4096];

/// Measurements of each kind; the report tells their median.
pub(crate) const ROUNDS: usize = 3;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [what, work, image] = &args[..]
        && what == snapshots::CHILD
    {
        return snapshots::run_child(work, image);
    }
    let dir = output_dir();
    let mut report = Report::default();
    match &args[..] {
        [what, rest @ ..] if what == "nbd" => nbd::measure(&dir, &rest.join(" "), &mut report),
        [what, rest @ ..] if what == "queue" => queue::measure(&dir, &rest.join(" "), &mut report),
        [what, sizes @ ..] if what == "live" => live::measure(sizes, &dir, &mut report),
        [what, sizes @ ..] if what == "load" => load::measure(sizes, &dir, &mut report),
        [what, sizes @ ..] if what == "speed" => speed::measure(sizes, &dir, &mut report),
        [what, sizes @ ..] if what == "rewind" => rewind::measure(sizes, &dir, &mut report),
        [what, sizes @ ..] if what == "machines" => machines(sizes, &dir, &mut report),
        [what] if what == "tracking" => tracking::measure(&dir, &mut report),
        [what] if what == "group" => group::measure(&dir, &mut report),
        [what] if what == "snapshots" => snapshots::measure(&dir, &mut report),
        [what] if what == "forks" => forks::measure(&dir, &mut report),
        _ => {
            machines(&args, &dir, &mut report);
            forks::measure(&dir, &mut report);
            live::measure(&args, &dir, &mut report);
            load::measure(&args, &dir, &mut report);
            speed::measure(&args, &dir, &mut report);
            tracking::measure(&dir, &mut report);
            group::measure(&dir, &mut report);
            nbd::measure(&dir, "", &mut report);
            queue::measure(&dir, "", &mut report);
            snapshots::measure(&dir, &mut report);
        }
    }
    let text = report.markdown();
    std::fs::write(dir.join("report.md"), &text).unwrap();
    std::fs::write(dir.join("report.json"), report.json()).unwrap();
    println!("{text}");
}

/// Checkpoints and start of machines.
fn machines(args: &[String], dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let given: Vec<u64> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let sizes = if given.is_empty() { SIZES.to_vec() } else { given };
    let programs = programs(report);
    let dd = disk::Dd::new(dir);
    for used in sizes {
        for round in 0..ROUNDS {
            dd.measure(report);
            for program in &programs {
                eprintln!("{} with {used} MiB in use, round {}", program.name(), round + 1);
                checkpoint::measure(*program, used, dir, report);
            }
        }
    }
    rewind::measure(&[], dir, report);
    // How the image is opened has no part in a start.
    for program in programs.iter().filter(|program| **program != Program::QemuDirect) {
        eprintln!("start of {}", program.name());
        start::measure(*program, dir, report);
    }
}

/// Tardigrade, and QEMU where it is installed.
pub(crate) fn programs(report: &mut Report) -> Vec<Program> {
    match program::qemu_version() {
        Some(version) => {
            report.note(&format!("QEMU: {version}"));
            vec![Program::Tardigrade, Program::Qemu, Program::QemuDirect]
        }
        None => {
            let text = "QEMU is not here, so nothing is compared with it. On Debian 12: enable \
                        bookworm-backports, then apt-get install -t bookworm-backports \
                        qemu-system-x86 qemu-utils";
            eprintln!("{text}");
            report.note(text);
            vec![Program::Tardigrade]
        }
    }
}

/// `bench` in the build's own directory: on a real disk, and nothing of the repository.
fn output_dir() -> PathBuf {
    let dir = program::tardigrade().parent().unwrap().parent().unwrap().join("bench");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}
