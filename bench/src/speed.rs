//! How long a load takes until the guest is as fast as it was: its second vCPU looks at random pages of
//! its RAM all the time, and keeps a record of how many by when.
//!
//! What it does after the load depends on the way: RAM that comes page by page makes the first looks slow, RAM that is
//! read before keeps the guest waiting. Both have to build the host's page tables anew.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tardigrade_tests::baremetal::layout::SCRATCH;
use tardigrade_tests::baremetal::{Monitor, Routine, apic, image};
use tardigrade_tests::disk::qemu_img;

use crate::checkpoint::{forget_cached, ticks_per_ms, used_ranges};
use crate::program::{Machine, Program};
use crate::report::{Report, number};
use crate::{ROUNDS, programs};

/// RAM in use, in MiB.
const SIZES: &[u64] = &[256, 1024];
/// The words that the looking vCPU is told by: end, ticks between two entries, next entry, last entry.
const WORDS: u64 = SCRATCH + 0x8000;
/// The record: an entry has the TSC and the number of looks.
const RECORD: u64 = SCRATCH + 0x1_0000;
const RECORD_END: u64 = SCRATCH + 0xb_0000;
const ENTRY: u64 = 16;
/// Milliseconds between two entries.
const STEP: f64 = 5.0;
/// Entries in which the speed must be there: 50 ms.
const SPAN: usize = 10;
/// The part of the speed that counts.
const PART: f64 = 0.9;
/// How long after a load the speed is waited for.
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of the record that are read at a time. QEMU's serial port loses what its socket does not take at once,
/// and that is a few hundred bytes, each in a message of its own.
const PIECE: u64 = 10 * ENTRY;
/// How long the guest looks at its RAM before it is measured.
const SETTLE: Duration = Duration::from_secs(2);

/// Ways to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Lazy,
    Eager,
    Qemu,
}

impl Way {
    fn all(programs: &[Program]) -> Vec<Self> {
        let all = [Self::Lazy, Self::Eager, Self::Qemu];
        all.into_iter().filter(|way| programs.contains(&way.program())).collect()
    }

    fn program(self) -> Program {
        match self {
            Self::Lazy | Self::Eager => Program::Tardigrade,
            Self::Qemu => Program::Qemu,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Lazy => "Tardigrade, lazy",
            Self::Eager => "Tardigrade, eager",
            Self::Qemu => "QEMU",
        }
    }

    fn arguments(self) -> Value {
        match self {
            Self::Lazy => json!({ "x-mode": "lazy" }),
            Self::Eager => json!({ "x-mode": "eager" }),
            Self::Qemu => json!({}),
        }
    }
}

/// Measures all sizes, and adds the table.
pub(crate) fn measure(sizes: &[String], dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    let given: Vec<u64> = sizes.iter().filter_map(|size| size.parse().ok()).collect();
    let sizes = if given.is_empty() { SIZES.to_vec() } else { given };
    let ways = Way::all(&programs(report));
    for used in sizes {
        for round in 0..ROUNDS {
            for way in &ways {
                eprintln!("speed after a load, {}: {used} MiB, round {}", way.name(), round + 1);
                one(*way, used, dir, report);
            }
        }
    }
    report.section(move |report| table(report, &ways));
}

fn one(way: Way, used: u64, dir: &Path, report: &mut Report) {
    let (kernel, disk) = (dir.join("guest.elf"), dir.join("disk.qcow2"));
    image::write(&kernel);
    // It may be the first.
    let _ = std::fs::remove_file(&disk);
    qemu_img(&["create", "-q", "-f", "qcow2", &disk.display().to_string(), "64M"]);
    let mut command = way.program().command(&kernel, used + 64);
    command.args(["--smp", "2"]);
    let mut machine = Machine::start(way.program(), command, &disk, dir);
    let mut guest = machine.monitor();
    let ranges = used_ranges(used);
    for range in ranges.clone() {
        guest.fill(range, 1);
    }
    let ticks = ticks_per_ms(&mut guest);
    start_looking(&mut guest, used, ticks);
    let mut qmp = machine.connect();
    let mut record = Record { next: guest.peek(WORDS + 16), entries: Vec::new() };
    machine.job_on(&mut qmp, "snapshot-save", "bench");
    // A guest that has not written would only be put back, which `rewind` measures.
    for range in ranges {
        guest.fill(range, 2);
    }
    std::thread::sleep(SETTLE);
    let before = recent_rate(&mut guest).expect("the guest does not look");

    forget_cached(&disk);
    qmp.take_events();
    let start = since_epoch();
    machine.job_on_with(&mut qmp, "snapshot-load", "bench", &way.arguments());
    let resumed = time_of(&qmp.take_events(), "RESUME");
    report.add(RESUMED, way.name(), used, resumed - start);
    report.add(RATE, way.name(), used, before * ticks);
    let host = host_time(&mut guest, ticks);
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        record.read(&mut guest);
        if let Some(fast) = record.fast_from(resumed, before * PART, &host) {
            report.add(FAST, way.name(), used, fast - start);
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // QEMU talks to one client at a time.
    drop(qmp);
    machine.quit();
    std::fs::remove_file(&disk).unwrap();
}

const RESUMED: &str = "load to RESUME, ms";
const FAST: &str = "load to 90 % of speed, ms";
const RATE: &str = "looks per ms";

/// An entry of the record.
struct Entry {
    tsc: u64,
    looks: u64,
}

/// Looks per tick between two entries.
fn rate(first: &Entry, last: &Entry) -> f64 {
    (last.looks - first.looks) as f64 / (last.tsc - first.tsc) as f64
}

/// What has been read of the guest's record, from about the save on.
struct Record {
    /// Address of the first entry that has not.
    next: u64,
    entries: Vec<Entry>,
}

impl Record {
    /// Reads what is new.
    fn read(&mut self, guest: &mut Monitor) {
        let end = guest.peek(WORDS + 16);
        while self.next < end {
            let length = (end - self.next).min(PIECE);
            let bytes = guest.bytes(self.next, usize::try_from(length).unwrap());
            let words: Vec<u64> =
                bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
            let entries = words.as_chunks::<2>().0;
            self.entries.extend(entries.iter().map(|&[tsc, looks]| Entry { tsc, looks }));
            self.next += length;
        }
    }

    /// The host's time of the first entry since `resumed` from which on the guest is that fast, if there is one.
    fn fast_from(&self, resumed: f64, least: f64, host: &dyn Fn(u64) -> f64) -> Option<f64> {
        // The clock goes on from the save: what was entered before that has earlier times.
        let from = self.entries.partition_point(|entry| host(entry.tsc) < resumed);
        let mut spans = self.entries[from..].windows(SPAN + 1);
        let fast = spans.find(|span| rate(&span[0], &span[SPAN]) >= least)?;
        Some(host(fast[0].tsc))
    }
}

/// Tells the host's time at a TSC of the guest, in milliseconds; from the quickest of some answers.
fn host_time(guest: &mut Monitor, ticks: f64) -> impl Fn(u64) -> f64 + use<> {
    let mut asks = (0..10).map(|_| {
        let asked = since_epoch();
        let tsc = guest.tsc();
        (since_epoch() - asked, asked, tsc)
    });
    let first = asks.next().unwrap();
    let (took, asked, tsc) = asks.fold(first, |best, ask| if ask.0 < best.0 { ask } else { best });
    let now = asked + took / 2.0;
    move |then| now - (tsc as f64 - then as f64) / ticks
}

/// Milliseconds.
pub(crate) fn since_epoch() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e3
}

/// When an event was, in milliseconds.
pub(crate) fn time_of(events: &[Value], name: &str) -> f64 {
    let event = events.iter().rfind(|event| event["event"] == name);
    let time = &event.unwrap_or_else(|| panic!("no {name}"))["timestamp"];
    time["seconds"].as_f64().unwrap() * 1e3 + time["microseconds"].as_f64().unwrap() / 1e3
}

/// The second vCPU looks at pages of low memory, all the time.
fn start_looking(guest: &mut Monitor, used: u64, ticks_per_ms: f64) {
    apic::start_vcpu(guest, 1);
    let low = used_ranges(used).swap_remove(0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ticks")]
    let step = (ticks_per_ms * STEP) as u64;
    for (address, word) in (WORDS..).step_by(8).zip([0, step, RECORD, RECORD_END]) {
        guest.poke(address, word);
    }
    let pages = (low.end - low.start) / 4096;
    guest.start_on(1, Routine::User, &[Routine::Look as u64, low.start, pages, WORDS]);
    guest.wait_word(WORDS + 16, |next| next > RECORD + 2 * SPAN as u64 * ENTRY);
}

/// Looks per tick of late; none before there are enough entries.
fn recent_rate(guest: &mut Monitor) -> Option<f64> {
    let last = guest.peek(WORDS + 16) - ENTRY;
    assert!(last < RECORD_END - ENTRY, "the record is full");
    let first = last.checked_sub(2 * SPAN as u64 * ENTRY).filter(|first| *first >= RECORD)?;
    let mut entry = |at: u64| Entry { tsc: guest.peek(at), looks: guest.peek(at + 8) };
    let (first, last) = (entry(first), entry(last));
    Some(rate(&first, &last))
}

fn table(report: &Report, ways: &[Way]) -> String {
    let mut text = String::from(
        "| After a load: RAM in use | how | the guest runs, ms | it is as fast as before (90 %), ms | looks per ms before |\n\
         |---|---|---:|---:|---:|\n",
    );
    for used in report.sizes(RESUMED) {
        for way in ways {
            let value = |what| number(report.median(what, way.name(), used), 1);
            let (resumed, rate) = (value(RESUMED), value(RATE));
            let rounds = report.count(RESUMED, way.name(), used);
            let fast = match report.count(FAST, way.name(), used) {
                0 => format!("not reached in {} s", LIMIT.as_secs()),
                reached if reached < rounds => {
                    format!("{} in {reached} of {rounds} rounds", value(FAST))
                }
                _ => value(FAST),
            };
            let _ = writeln!(text, "| {used} MiB | {} | {resumed} | {fast} | {rate} |", way.name());
        }
    }
    text + "\n"
}
