//! Start of the process to the first guest instruction, and what the process takes beside guest RAM.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use qmp::client::Client;
use tardigrade_tests::baremetal::image;
use tardigrade_tests::disk::qemu_img;

use crate::program::{Machine, PATIENCE, Program};
use crate::report::Report;

const ROUNDS: usize = 11;
/// Guest RAM in MiB.
const RAM: u64 = 256;

pub(crate) fn measure(program: Program, dir: &Path, report: &mut Report) {
    let kernel = dir.join("guest.elf");
    image::write(&kernel);
    for _ in 0..ROUNDS {
        let time = first_byte(program, &kernel);
        report.add("first instruction ms", program.name(), RAM, time.as_secs_f64() * 1e3);
    }
    if program == Program::Tardigrade {
        let linux = tardigrade_tests::repo("resources/guest/tiny.bzImage");
        for _ in 0..ROUNDS {
            let time = loaded(program, &linux, dir);
            report.add("Linux loaded ms", program.name(), RAM, time.as_secs_f64() * 1e3);
            let time = loaded(program, &kernel, dir);
            report.add("guest loaded ms", program.name(), RAM, time.as_secs_f64() * 1e3);
        }
    }
    let disk = dir.join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let machine = Machine::start(program, program.command(&kernel, RAM), &disk, dir);
    machine.monitor();
    report.add("memory MiB", program.name(), RAM, beside_ram(machine.pid(), "Rss:"));
    report.add("private MiB", program.name(), RAM, beside_ram(machine.pid(), "Private_Dirty:"));
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

/// The first thing the guest does is to send a letter; the console is a pipe.
fn first_byte(program: Program, kernel: &Path) -> Duration {
    let mut command = program.command(kernel, RAM);
    let start = Instant::now();
    let mut child = command.args(["--serial", "stdio"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut byte = [0];
    child.stdout.take().unwrap().read_exact(&mut byte).unwrap();
    let time = start.elapsed();
    assert_eq!(byte, *b"S");
    child.kill().unwrap();
    child.wait().unwrap();
    time
}

/// With `-S` the QMP server greets when all is done but to let the vCPUs run.
fn loaded(program: Program, kernel: &Path, dir: &Path) -> Duration {
    let socket = dir.join("qmp");
    // It may be the first.
    let _ = std::fs::remove_file(&socket);
    let mut command = program.command(kernel, RAM);
    let start = Instant::now();
    let mut child = command
        .args(["-S", "--serial", "null"])
        .args(["--qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .spawn()
        .unwrap();
    while Client::connect_with(&socket, PATIENCE).is_err() {
        assert!(start.elapsed() < PATIENCE, "no QMP server");
        std::thread::sleep(Duration::from_micros(100));
    }
    let time = start.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    time
}

/// MiB of one kind that the process has in mappings that are smaller than guest RAM.
fn beside_ram(pid: u32, kind: &str) -> f64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut kib = 0;
    let mut is_ram = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, number) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok()));
        match (name, number) {
            (Some("Size:"), Some(n)) => is_ram = n >= RAM << 10,
            (Some(name), Some(n)) if name == kind && !is_ram => kib += n,
            _ => {}
        }
    }
    kib as f64 / 1024.0
}
