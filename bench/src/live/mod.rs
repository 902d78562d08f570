//! Saves of a guest that goes on: how long it stands still, whatever its RAM and however fast it writes,
//! and what each checkpoint costs.

mod method;
mod plot;
mod table;

use std::path::Path;
use std::time::Duration;

use tardigrade_tests::baremetal::layout::{FREE, SCRATCH};
use tardigrade_tests::baremetal::{Monitor, Routine, apic, image};
use tardigrade_tests::disk::qemu_img;

use crate::checkpoint::{ticks_per_ms, used_ranges};
use crate::program::Machine;
use crate::report::Report;
use crate::{ROUNDS, programs};
use method::Method;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// RAM in use, in MiB.
const SIZES: &[u64] = &[256, 1024, 4096, 8192];
/// What the guest writes to all the time, in MB/s.
const RATES: &[u64] = &[0, 100, 1000];
/// The word that ends the writing; behind it the ticks between two pages.
const STOP: u64 = SCRATCH + 0x8000;

/// Measures all sizes and rates, and adds the tables. The plot goes to `pause.svg` in `dir`.
pub(crate) fn measure(sizes: &[String], dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let given: Vec<u64> = sizes.iter().filter_map(|size| size.parse().ok()).collect();
    let sizes = if given.is_empty() { SIZES.to_vec() } else { given };
    let methods = Method::all(&programs(report));
    for used in sizes {
        for round in 0..rounds(used) {
            for method in &methods {
                for rate in RATES {
                    eprintln!("{}: {used} MiB, {rate} MB/s, round {}", method.name(), round + 1);
                    one(*method, used, *rate, dir, report);
                }
            }
        }
    }
    plot::write(report, &methods, &dir.join("pause.svg"));
    report.section(move |report| table::all(report, &methods));
}

/// Of large machines one: QEMU's part alone takes minutes.
fn rounds(used: u64) -> usize {
    if used > 2048 { 1 } else { ROUNDS }
}

/// What is measured at a rate: the names in the report.
fn what(name: &str, rate: u64) -> String {
    format!("live {name} at {rate} MB/s")
}

/// One machine, saved as often as its method allows.
fn one(method: Method, used: u64, rate: u64, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    let file = disk.display().to_string();
    qemu_img(
        &[&["create", "-q", "-f", "qcow2"], method.image_options(), &[&*file, "64M"]].concat(),
    );
    let mut command = method.program().command(&kernel, used + 64);
    command.args(method.options()).args(["--smp", "2"]);
    let mut machine = Machine::start(method.program(), command, &disk, dir);
    let mut guest = machine.monitor();
    for range in used_ranges(used) {
        guest.fill(range, 1);
    }
    let ticks = ticks_per_ms(&mut guest);
    start_writing(&mut guest, used, rate, ticks);
    let idle = guest.watch(|| std::thread::sleep(Duration::from_millis(200)));
    report.add("live idle", method.name(), used, idle as f64 / ticks);
    for number in 0..method.saves(used) {
        let before = machine.bytes_written();
        let mut took = Duration::ZERO;
        let gap = guest.watch(|| {
            // Until the guest has the whole request.
            std::thread::sleep(Duration::from_millis(100));
            took = method.save(&mut machine, &format!("save{number}"), dir);
        });
        let written = (machine.bytes_written() - before) as f64 / MIB as f64;
        let which = if number == 0 { "first" } else { "next" };
        let told = method.is_live().then(|| machine.last_pause());
        let mut add = |name: &str, value| report.add(&what(name, rate), method.name(), used, value);
        told.into_iter().for_each(|pause| add("told pause", pause));
        add("pause", gap as f64 / ticks);
        add(&format!("{which} MiB"), written);
        add(&format!("{which} ms"), took.as_secs_f64() * 1e3);
        if number > 0 {
            machine.delete(&format!("save{}", number - 1));
        }
    }
    guest.poke(STOP, 1);
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

/// The second vCPU writes to one page after the other of low memory, all the time.
fn start_writing(guest: &mut Monitor, used: u64, rate: u64, ticks_per_ms: f64) {
    apic::start_vcpu(guest, 1);
    guest.poke(STOP, 0);
    if rate == 0 {
        return;
    }
    let per_page = ticks_per_ms * 1000.0 * PAGE as f64 / (rate as f64 * 1e6);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ticks")]
    guest.poke(STOP + 8, per_page as u64);
    let end = used_ranges(used).first().map_or(FREE, |low| low.end);
    guest.start_on(1, Routine::User, &[Routine::Dirty as u64, FREE, end, STOP]);
}
