//! Saves of a guest that goes on: how long it stands still, whatever its RAM and however fast it writes,
//! and what the second checkpoint costs.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use tardigrade_tests::baremetal::layout::{FREE, SCRATCH};
use tardigrade_tests::baremetal::{Monitor, Routine, apic, image};
use tardigrade_tests::disk::qemu_img;

use crate::checkpoint::ticks_per_ms;
use crate::program::{Machine, Program};
use crate::report::{Report, number};
use crate::{ROUNDS, SIZES, programs};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// What the guest writes to all the time, in MB/s.
const RATES: &[u64] = &[0, 100, 1000];
/// Most RAM of one guest, in MiB: below the 32-bit hole, with room for QEMU's firmware.
const MOST: u64 = 2900;
/// The word that ends the writing; behind it the ticks between two pages.
const STOP: u64 = SCRATCH + 0x8000;

/// Measures all sizes and rates, and adds the table.
pub(crate) fn measure(sizes: &[String], dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let given: Vec<u64> = sizes.iter().filter_map(|size| size.parse().ok()).collect();
    let sizes = if given.is_empty() { SIZES.to_vec() } else { given };
    let programs = programs(report);
    for used in sizes {
        for _ in 0..ROUNDS {
            for program in programs.iter().filter(|program| **program != Program::QemuDirect) {
                for rate in RATES {
                    eprintln!("{}: {used} MiB, {rate} MB/s", program.name());
                    one(*program, used, *rate, dir, report);
                }
            }
        }
    }
    report.section(table);
}

fn pause(rate: u64) -> String {
    format!("pause at {rate} MB/s")
}

fn second(rate: u64) -> String {
    format!("second at {rate} MB/s")
}

/// One machine, saved twice.
fn one(program: Program, used: u64, rate: u64, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let mut command = program.command(&kernel, used + 64);
    command.args([if program == Program::Tardigrade { "--smp" } else { "-smp" }, "2"]);
    let mut machine = Machine::start(program, command, &disk, dir);
    let mut guest = machine.monitor();
    let range = FREE..FREE + used.min(MOST) * MIB;
    guest.fill(range.clone(), 1);
    if used > MOST {
        guest.fill(4096 * MIB..(4096 + used - MOST) * MIB, 1);
    }
    let ticks = ticks_per_ms(&mut guest);
    apic::start_vcpu(&mut guest, 1);
    guest.poke(STOP, 0);
    if rate > 0 {
        let per_page = ticks * 1000.0 * PAGE as f64 / (rate as f64 * 1e6);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ticks")]
        guest.poke(STOP + 8, per_page as u64);
        let writes = &[Routine::Dirty as u64, range.start, range.end, STOP];
        guest.start_on(1, Routine::User, writes);
    }
    let idle = guest.watch(|| std::thread::sleep(Duration::from_millis(200)));
    report.add("live idle", program.name(), used, idle as f64 / ticks);
    for tag in ["first", "second"] {
        let before = machine.bytes_written();
        let gap = saved(&mut guest, &mut machine, tag);
        let written = (machine.bytes_written() - before) as f64 / MIB as f64;
        report.add(&pause(rate), program.name(), used, gap as f64 / ticks);
        if tag == "second" {
            report.add(&second(rate), program.name(), used, written);
        }
    }
    guest.poke(STOP, 1);
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

/// The longest gap that the guest sees while it is saved, in TSC ticks.
fn saved(guest: &mut Monitor, machine: &mut Machine, tag: &str) -> u64 {
    guest.watch(|| {
        // Until the guest has the whole request.
        std::thread::sleep(Duration::from_millis(300));
        machine.job("snapshot-save", tag);
    })
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "| A save of a guest that writes: RAM in use | it writes, MB/s | pause, ours, ms | pause, QEMU, ms | idle gap, ours, ms | \
         second checkpoint, ours, MiB written | QEMU, MiB written |\n|---|---:|---:|---:|---:|---:|---:|"
    );
    for used in report.sizes("live idle") {
        for rate in RATES {
            let value = |what: &str, who: Program| number(report.median(what, who.name(), used), 1);
            let _ = writeln!(
                text,
                "| {used} MiB | {rate} | {} | {} | {} | {} | {} |",
                value(&pause(*rate), Program::Tardigrade),
                value(&pause(*rate), Program::Qemu),
                value("live idle", Program::Tardigrade),
                value(&second(*rate), Program::Tardigrade),
                value(&second(*rate), Program::Qemu),
            );
        }
    }
    let _ = writeln!(text);
    text
}
