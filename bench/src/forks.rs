//! A hundred guests from one checkpoint: time until all of them run, and memory that each takes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp::client::Client;
use serde_json::json;
use tardigrade_tests::baremetal::{Monitor, image};
use tardigrade_tests::disk::qemu_img;

use crate::program::{Machine, PATIENCE, Program, tardigrade};
use crate::report::Report;

/// Guest RAM in MiB.
const RAM: u64 = 256;
/// What of it the guest uses.
const USED: u64 = 192;
/// How many forks run at once.
const COUNTS: [usize; 2] = [1, 100];
/// What each fork writes, in MiB.
const WRITTEN: u64 = 1;
const MIB: u64 = 1 << 20;
/// Where the guest's own code and tables end.
const START: u64 = 16 * MIB;

/// Measures, and adds a table.
pub(crate) fn measure(dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let image = dir.join("forks.qcow2");
    make_base(dir, &image);
    for count in COUNTS {
        eprintln!("{count} forks");
        let forks = dir.join("forks");
        // They may be another run's.
        let _ = std::fs::remove_dir_all(&forks);
        std::fs::create_dir_all(&forks).unwrap();
        run(&image, &forks, count, report);
        std::fs::remove_dir_all(&forks).unwrap();
    }
    std::fs::remove_file(&image).unwrap();
    report.section(table);
}

/// An image with a checkpoint of a guest whose pages are all different.
fn make_base(dir: &Path, disk: &Path) {
    let kernel = dir.join("guest.elf");
    image::write(&kernel);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let command = Program::Tardigrade.command(&kernel, RAM);
    let mut machine = Machine::start(Program::Tardigrade, command, disk, dir);
    machine.monitor().fill(START..USED * MIB, 1);
    machine.job("snapshot-save", "base");
    machine.quit();
}

struct Fork {
    child: Child,
    serial: PathBuf,
}

impl Drop for Fork {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(image: &Path, dir: &Path, count: usize, report: &mut Report) {
    let size = u64::try_from(count).unwrap();
    let before = cached_and_used();
    let start = Instant::now();
    let forks: Vec<_> = (0..count).map(|at| fork(image, dir, at)).collect();
    let mut qmp: Vec<_> = forks.iter().map(|fork| wait(fork, start)).collect();
    // This guest never idles: one at a time, or they would measure each other.
    let mut each = |work: &mut dyn FnMut(&mut Monitor)| {
        for (fork, qmp) in forks.iter().zip(&mut qmp) {
            qmp.execute("cont", json!({})).unwrap();
            work(&mut Monitor::connect(&fork.serial));
            qmp.execute("stop", json!({})).unwrap();
        }
    };
    each(&mut |guest| {
        guest.tsc();
    });
    report.add("forks running ms", "Tardigrade", size, start.elapsed().as_secs_f64() * 1e3);
    report.add("fork PSS MiB", "Tardigrade", size, pss(&forks));
    each(&mut |guest| guest.verify(START..USED * MIB, 1));
    report.add("fork PSS after reads MiB", "Tardigrade", size, pss(&forks));
    each(&mut |guest| guest.fill(START..START + WRITTEN * MIB, 2));
    report.add("fork PSS after writes MiB", "Tardigrade", size, pss(&forks));
    let used = cached_and_used().saturating_sub(before);
    report.add("host memory for forks MiB", "Tardigrade", size, used as f64 / 1024.0);
}

fn fork(image: &Path, dir: &Path, at: usize) -> Fork {
    let serial = dir.join(format!("serial{at}"));
    let child = Command::new(tardigrade())
        .arg("-S")
        .args(["--fork", &format!("{}#base", image.display())])
        .args(["--serial", &format!("unix:{},server=on,wait=off", serial.display())])
        .args([
            "--qmp",
            &format!("unix:{},server=on,wait=off", dir.join(format!("qmp{at}")).display()),
        ])
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Fork { child, serial }
}

/// Waits until all is done but to let the guest run.
fn wait(fork: &Fork, start: Instant) -> Client {
    let qmp = fork.serial.with_file_name(
        fork.serial.file_name().unwrap().to_str().unwrap().replace("serial", "qmp"),
    );
    loop {
        match Client::connect_with(&qmp, PATIENCE) {
            Ok(client) => return client,
            Err(error) => assert!(start.elapsed() < PATIENCE, "a fork does not start: {error}"),
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What a fork takes on average, in MiB: its own memory, and its share of what is shared.
fn pss(forks: &[Fork]) -> f64 {
    let of = |fork: &Fork| {
        let path = format!("/proc/{}/smaps_rollup", fork.child.id());
        field(&std::fs::read_to_string(path).unwrap(), "Pss:")
    };
    forks.iter().map(of).sum::<u64>() as f64 / forks.len() as f64 / 1024.0
}

/// Memory of the host that is in use or caches files, in KiB.
fn cached_and_used() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    field(&text, "MemTotal:") - field(&text, "MemFree:")
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "\n## Forks\n\nGuests of {RAM} MiB, {USED} MiB of it in use, from one checkpoint at once. PSS is what a \
         process takes, its share of what is shared included.\n\n\
         | forks | until all answer | PSS of each | after it has read all | after it has written {WRITTEN} MiB | \
         host memory for all |\n|---|---|---|---|---|---|\n"
    );
    for count in COUNTS {
        let size = u64::try_from(count).unwrap();
        let median = |what: &str| report.median(what, "Tardigrade", size).unwrap_or(f64::NAN);
        text.push_str(&format!(
            "| {count} | {:.0} ms | {:.1} MiB | {:.1} MiB | {:.1} MiB | {:.0} MiB |\n",
            median("forks running ms"),
            median("fork PSS MiB"),
            median("fork PSS after reads MiB"),
            median("fork PSS after writes MiB"),
            median("host memory for forks MiB"),
        ));
    }
    text
}
