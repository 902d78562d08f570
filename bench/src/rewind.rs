//! Going back to one checkpoint again and again, as a fuzzer does, through QMP.
//!
//! The checkpoint has a guest that finds a byte at its serial port. It takes it, writes to 256 pages, says how
//! many of them were as in the checkpoint, and waits for another byte. Then it is taken back.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::{Monitor, image};
use tardigrade_tests::disk::qemu_img;

use crate::checkpoint::ticks_per_ms;
use crate::program::{Machine, PATIENCE, Program};
use crate::report::{Report, number};

const MIB: u64 = 1 << 20;
/// RAM of the guest in MiB.
const SIZES: &[u64] = &[256, 4096];
/// RAM with data in MiB, none of which is in `TRIAL`.
const USED: u64 = 200;
/// What the guest writes to between two loads, zero in the checkpoint: 256 pages.
const TRIAL: Range<u64> = FREE + USED * MIB..FREE + (USED + 1) * MIB;
const PAGES: u16 = 256;
/// How long loads are repeated, for each number.
const TIME: Duration = Duration::from_secs(5);
/// How often the guest tells of its time.
const LOOKS: usize = 21;

const RATE: &str = "trials a second";
const CYCLE: &str = "load and run, us";
const LOAD: &str = "load, us";
const GUEST: &str = "guest, us";
const PUT_BACK: &str = "put back, KiB";

/// Of QEMU there is the time of a load in the table of checkpoints: it has no cheaper way back.
pub(crate) fn measure(sizes: &[String], dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let given: Vec<u64> = sizes.iter().filter_map(|size| size.parse().ok()).collect();
    for ram in if given.is_empty() { SIZES.to_vec() } else { given } {
        eprintln!("going back, {ram} MiB of RAM");
        trials(ram, dir, report);
    }
    report.section(table);
}

fn table(report: &Report) -> String {
    let mut text = String::from(
        "| Load, run, load, ... of one checkpoint; the guest writes to 256 pages in between | times a second | \
         put back each time, KiB | load and run, median, µs | load, median, µs | the writes, in the guest, median, µs |\n\
         |---|---:|---:|---:|---:|---:|\n",
    );
    for ram in report.sizes(RATE) {
        let value = |what: &str, digits| {
            number(report.median(what, Program::Tardigrade.name(), ram), digits)
        };
        let (rate, kib) = (value(RATE, 0), value(PUT_BACK, 0));
        let (all, load, guest) = (value(CYCLE, 0), value(LOAD, 0), value(GUEST, 0));
        let _ = writeln!(text, "| {ram} MiB of RAM | {rate} | {kib} | {all} | {load} | {guest} |");
    }
    text + "\n"
}

fn trials(ram: u64, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let program = Program::Tardigrade;
    let mut machine = Machine::start(program, program.command(&kernel, ram), &disk, dir);
    let mut guest = machine.monitor();
    let ticks = ticks_per_ms(&mut guest);
    guest.fill(FREE..FREE + USED * MIB, 1);
    guest.start_trials(TRIAL);
    // It has read the request, byte by byte.
    std::thread::sleep(Duration::from_millis(300));
    let mut qmp = machine.connect();
    qmp.execute("stop", json!({})).unwrap();
    guest.send(&[1]);
    // The byte is to be in the guest's serial port. If it is not, the guest will not answer.
    std::thread::sleep(Duration::from_millis(300));
    machine.job("snapshot-save", "bench");
    qmp.execute("cont", json!({})).unwrap();
    // Nobody reads the events of the loads there.
    drop(qmp);
    assert_eq!(guest.trial(), PAGES);

    let mut loads = Loads::connect(machine.qmp_path());
    // Of the load that is to be dismissed. Answers that come late would be those of the trials after.
    assert_eq!(guest.trial(), PAGES);
    let before = machine.rewound().unwrap_or(0);
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < TIME {
        let load = Instant::now();
        loads.start();
        // Not before it was taken back, and has run.
        assert_eq!(guest.trial(), PAGES, "the guest was not as in the checkpoint");
        loads.finish();
        report.add(CYCLE, program.name(), ram, load.elapsed().as_secs_f64() * 1e6);
        count += 1;
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    report.add(RATE, program.name(), ram, rate);
    let put_back = (machine.rewound().unwrap_or(0) - before) as f64 / f64::from(count);
    report.add(PUT_BACK, program.name(), ram, put_back / 1024.0);
    let start = Instant::now();
    while start.elapsed() < TIME {
        let load = Instant::now();
        loads.start();
        loads.finish();
        report.add(LOAD, program.name(), ram, load.elapsed().as_secs_f64() * 1e6);
        assert_eq!(guest.trial(), PAGES);
    }
    for _ in 0..LOOKS {
        loads.start();
        assert_eq!(guest.trial(), PAGES);
        loads.finish();
        report.add(GUEST, program.name(), ram, own_time(&mut guest) / ticks * 1e3);
    }
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

/// TSC ticks from the first to the last write of a trial.
fn own_time(guest: &mut Monitor) -> f64 {
    guest.send(&[0]);
    guest.answer().unwrap();
    guest.peek(TRIAL.start + 8) as f64
}

/// Loads over one connection, with as few messages as a client needs: the job of the load before is
/// dismissed together with the next command.
struct Loads {
    to: UnixStream,
    from: BufReader<UnixStream>,
    line: String,
    count: u64,
}

impl Loads {
    fn connect(path: &Path) -> Self {
        let to = UnixStream::connect(path).unwrap();
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        let from = BufReader::new(to.try_clone().unwrap());
        let mut loads = Self { to, from, line: String::new(), count: 0 };
        loads.message();
        loads.to.write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
        loads.message();
        // There is a job to be dismissed from now on.
        loads.command("");
        loads.finish();
        loads
    }

    fn start(&mut self) {
        let dismiss = json!({"execute": "job-dismiss", "arguments": {"id": self.job()}});
        self.count += 1;
        self.command(&dismiss.to_string());
    }

    fn job(&self) -> String {
        format!("trial{}", self.count)
    }

    fn command(&mut self, before: &str) {
        let load = json!({"execute": "snapshot-load", "arguments": {
            "job-id": self.job(), "tag": "bench", "vmstate": "disk0", "devices": ["disk0"]
        }});
        self.to.write_all(format!("{before}{load}").as_bytes()).unwrap();
    }

    /// Waits until the load is over.
    fn finish(&mut self) {
        let job = self.job();
        loop {
            let message = self.message();
            assert!(message.get("error").is_none(), "{message}");
            let data = &message["data"];
            if data["status"] == "concluded" && data["id"] == job.as_str() {
                return;
            }
        }
    }

    fn message(&mut self) -> Value {
        self.line.clear();
        self.from.read_line(&mut self.line).unwrap();
        serde_json::from_str(&self.line).unwrap()
    }
}
