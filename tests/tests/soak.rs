//! Random sequences of all that can be done with checkpoints, on a guest that writes to memory and disk
//! all the time and looks whether what it reads is of one instant.
//!
//! After each step the guest must go on: a chain (`chain` and `disk_chain` in `guest.s`) that finds a
//! page or the disk of another moment ends, and then what it counts stays. A mark in memory tells which
//! checkpoint it runs from. Images are checked by `qemu-img` at each end of the process.
//!
//! A few steps run with all tests. `make soak SECONDS=3600` goes on for an hour. A failure tells its
//! seed and the steps before it; `SOAK_SEED` does these again. Their timing is the host's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::chains::Chains;
use tardigrade_tests::baremetal::layout::SCRATCH;
use tardigrade_tests::baremetal::{Monitor, machine, monitor};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::events::target;
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec};

const DISK: &[&str] = &["disk0"];
/// The word that tells checkpoints apart.
const MARK: u64 = SCRATCH + 0x8100;
/// What the guest does all the time.
const CHAINS: Chains = Chains { pages: 3000 };
/// Steps where nobody says how many.
const STEPS: u64 = 30;
/// Checkpoints at most.
const MOST: usize = 10;
const PATIENCE: Duration = Duration::from_secs(300);

/// How a job is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Waited for.
    Whole,
    /// Told to end after so many questions about it.
    Cancel(u32),
    /// The process is killed after so many.
    Kill(u32),
}

/// A machine, its image, and what is known of both.
struct Soak {
    _dir: tempfile::TempDir,
    spec: VmSpec,
    disk: Disk,
    vm: Option<(Vm, Monitor)>,
    /// The mark of each checkpoint by its tag.
    marks: BTreeMap<String, u64>,
    /// The mark that memory has.
    mark: u64,
    /// The one that is being deleted.
    doomed: Option<String>,
    next: u64,
    random: fastrand::Rng,
    done: BTreeMap<&'static str, u64>,
}

impl Soak {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk0.qcow2");
        let disk = Disk::create(path, "qcow2", &["compression_type=zstd"], "16M");
        let spec =
            machine(dir.path(), "64M", 3).args(&["--machine", "microvm,acpi=on"]).disk(&disk);
        let random = fastrand::Rng::with_seed(seed);
        let (marks, done) = (BTreeMap::new(), BTreeMap::new());
        let (vm, doomed) = (None, None);
        Self { _dir: dir, spec, disk, vm, marks, mark: 0, doomed, next: 0, random, done }
    }

    fn tell(&mut self, what: &'static str, detail: &str) {
        eprintln!("{what} {detail}");
        *self.done.entry(what).or_default() += 1;
    }

    fn any_tag(&mut self) -> Option<String> {
        let at = self.random.usize(..self.marks.len().max(1));
        self.marks.keys().nth(at).cloned()
    }

    /// A machine that runs: from a checkpoint if there is one, or booted.
    fn start(&mut self) {
        let Some(tag) = self.any_tag() else {
            self.tell("boot", "");
            let vm = self.spec.start();
            let mut guest = monitor(&vm);
            CHAINS.start(&mut guest);
            self.vm = Some((vm, guest));
            return self.set_mark();
        };
        let checkpoint = format!("{}#{tag}", self.disk.file());
        if self.random.bool() {
            self.fork(&checkpoint, self.marks[&tag]);
        }
        let mode = if self.random.bool() { "lazy" } else { "eager" };
        let (what, spec) = match self.random.bool() {
            true => ("loadvm", self.spec.clone().args(&["--loadvm", &tag])),
            false => ("restore", VmSpec::bare().args(&["--restore", &checkpoint])),
        };
        self.tell(what, &format!("{tag} {mode}"));
        let vm = spec.args(&["--load-mode", mode]).start();
        let guest = Monitor::connect(vm.serial_path());
        self.vm = Some((vm, guest));
        self.mark = self.marks[&tag];
        self.go_on();
    }

    /// Two guests from a checkpoint, at once, while nobody writes to the image.
    fn fork(&mut self, checkpoint: &str, mark: u64) {
        self.tell("forks", checkpoint);
        let fork = VmSpec::bare().args(&["--fork", checkpoint]);
        let forks = [fork.start(), fork.start()];
        for vm in &forks {
            let mut guest = Monitor::connect(vm.serial_path());
            CHAINS.go_on(&mut guest);
            assert_eq!(guest.peek(MARK), mark, "another checkpoint was forked");
        }
        forks.into_iter().for_each(Vm::quit);
    }

    fn vm(&mut self) -> &mut Vm {
        &mut self.vm.as_mut().unwrap().0
    }

    fn guest(&mut self) -> &mut Monitor {
        &mut self.vm.as_mut().unwrap().1
    }

    /// Has memory be other than that of all checkpoints.
    fn set_mark(&mut self) {
        self.next += 1;
        self.mark = self.next;
        let mark = self.mark;
        self.guest().poke(MARK, mark);
    }

    /// The guest goes on, from where it should be.
    fn go_on(&mut self) {
        let mark = self.mark;
        let guest = self.guest();
        CHAINS.go_on(guest);
        assert_eq!(guest.peek(MARK), mark, "the guest is of another checkpoint");
    }

    /// Starts a job, leaves it as told; `None` if the process was killed, else its error.
    fn job(&mut self, command: &str, mut arguments: Value, end: End) -> Option<Option<String>> {
        let id = "soak";
        arguments["job-id"] = json!(id);
        let mut qmp = self.vm().qmp();
        qmp.execute(command, arguments).unwrap();
        if let End::Cancel(questions) | End::Kill(questions) = end {
            for _ in 0..questions {
                qmp.execute("query-jobs", json!({})).unwrap();
            }
        }
        match end {
            End::Whole => {}
            // It may be over already.
            End::Cancel(_) => drop(qmp.execute("job-cancel", json!({ "id": id }))),
            End::Kill(_) => {
                self.kill();
                return None;
            }
        }
        let error = concluded(&mut qmp, id);
        qmp.execute("job-dismiss", json!({ "id": id })).unwrap();
        Some(error)
    }

    fn end(&mut self) -> End {
        let questions = self.random.u32(0..40);
        match self.random.u8(0..10) {
            0..7 => End::Whole,
            7..9 => End::Cancel(questions),
            _ => End::Kill(questions),
        }
    }

    fn save(&mut self) {
        let end = self.end();
        self.next += 1;
        let tag = format!("t{}", self.next);
        let compress = if self.random.bool() { "zstd" } else { "none" };
        let mode = if self.random.u8(0..4) == 0 { "stop" } else { "live" };
        self.tell("save", &format!("{tag} {mode} {compress} {end:?}"));
        let mut arguments = target(&tag, DISK);
        arguments["x-compress"] = json!(compress);
        arguments["x-mode"] = json!(mode);
        let mark = self.mark;
        match self.job("snapshot-save", arguments, end) {
            Some(None) => drop(self.marks.insert(tag, mark)),
            Some(Some(error)) => {
                assert_eq!((error.as_str(), end == End::Whole), ("Operation canceled", false));
            }
            // It was quick enough, or was not.
            None => {
                if self.disk.tags().contains(&tag) {
                    self.marks.insert(tag, mark);
                }
                return self.start();
            }
        }
        self.go_on();
        self.set_mark();
    }

    fn load(&mut self) {
        let Some(tag) = self.any_tag() else { return };
        let mode = if self.random.u8(0..3) == 0 { "eager" } else { "lazy" };
        // A load of the same checkpoint again is a rewind.
        for _ in 0..self.random.u8(1..4) {
            let end = match self.end() {
                // What is cancelled after memory was touched leaves no guest.
                End::Cancel(_) => End::Whole,
                other => other,
            };
            self.tell("load", &format!("{tag} {mode} {end:?}"));
            let mut arguments = target(&tag, DISK);
            arguments["x-mode"] = json!(mode);
            match self.job("snapshot-load", arguments, end) {
                Some(error) => assert_eq!(error, None),
                None => return self.start(),
            }
            self.mark = self.marks[&tag];
            if self.random.bool() {
                self.go_on();
            }
        }
        match self.random.u8(0..3) {
            0 => self.delete(&tag),
            1 => self.save(),
            _ => self.go_on(),
        }
    }

    fn delete(&mut self, tag: &str) {
        let end = match self.random.u8(0..8) {
            0 => End::Kill(self.random.u32(0..20)),
            _ => End::Whole,
        };
        self.tell("delete", &format!("{tag} {end:?}"));
        let arguments = json!({ "tag": tag, "devices": DISK });
        self.doomed = Some(tag.to_owned());
        let outcome = self.job("snapshot-delete", arguments, end);
        self.doomed = None;
        match outcome {
            Some(error) => assert_eq!(error, None),
            None => {
                if !self.disk.tags().iter().any(|there| there == tag) {
                    self.marks.remove(tag);
                }
                return self.start();
            }
        }
        self.marks.remove(tag);
        self.go_on();
    }

    fn reset(&mut self) {
        self.tell("reset", "");
        self.vm().qmp().execute("system_reset", json!({})).unwrap();
        let guest = self.guest();
        guest.wait_started();
        guest.tsc();
        CHAINS.start(guest);
        self.set_mark();
    }

    fn pause(&mut self) {
        self.tell("pause", "");
        self.vm().qmp().execute("stop", json!({})).unwrap();
        self.vm().qmp().execute("cont", json!({})).unwrap();
        self.go_on();
    }

    /// Ends the process at once; the image must be right all the same.
    fn kill(&mut self) {
        self.tell("kill", "");
        let (mut vm, guest) = self.vm.take().unwrap();
        drop(guest);
        vm.signal(libc::SIGKILL);
        vm.wait();
        qemu_img(&["check", "-q", "-r", "leaks", &self.disk.file()]);
        self.check();
    }

    fn quit(&mut self) {
        self.tell("quit", "");
        let (vm, guest) = self.vm.take().unwrap();
        drop(guest);
        vm.quit();
        self.check();
    }

    /// Nothing is wrong with the image, and every checkpoint is there but one that is being deleted.
    fn check(&self) {
        self.disk.check();
        let tags = self.disk.tags();
        let is_lost = |tag: &&String| !tags.contains(tag) && self.doomed.as_ref() != Some(*tag);
        assert_eq!(self.marks.keys().find(is_lost), None, "a checkpoint is lost");
    }

    fn step(&mut self) {
        while self.marks.len() > MOST {
            let tag = self.any_tag().unwrap();
            self.delete(&tag);
        }
        match self.random.u8(0..20) {
            0..8 => self.save(),
            8..15 => self.load(),
            15 => {
                if let Some(tag) = self.any_tag() {
                    self.delete(&tag);
                }
            }
            16 => self.reset(),
            17 => self.pause(),
            18 => {
                self.kill();
                self.start();
            }
            _ => {
                self.quit();
                self.start();
            }
        }
    }

    /// Every checkpoint is still what it was.
    fn look_at_all(&mut self) {
        for (tag, mark) in self.marks.clone() {
            let error = self.job("snapshot-load", target(&tag, DISK), End::Whole);
            assert_eq!(error, Some(None), "{tag}");
            self.mark = mark;
            self.go_on();
        }
    }
}

/// Waits for the end of a job; gives its error.
fn concluded(qmp: &mut Client, id: &str) -> Option<String> {
    qmp.wait_event(PATIENCE, |event| {
        event["data"]["id"] == id && event["data"]["status"] == "concluded"
    })
    .unwrap();
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id).unwrap().clone();
    job["error"].as_str().map(str::to_owned)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

#[test]
fn whatever_is_done_with_checkpoints_every_one_is_an_instant_of_the_guest() {
    if !require::kvm() {
        return;
    }
    let seed = number("SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    let time = number("SOAK_SECONDS").map(Duration::from_secs);
    let most = number("SOAK_STEPS").unwrap_or(if time.is_some() { u64::MAX } else { STEPS });
    eprintln!("SOAK_SEED={seed}");
    let mut soak = Soak::new(seed);
    let start = Instant::now();
    soak.start();
    let mut steps = 0;
    while steps < most && time.is_none_or(|time| start.elapsed() < time) {
        soak.step();
        steps += 1;
        // Looking costs as much as what there is to look at.
        if steps % 100 == 0 {
            soak.look_at_all();
            println!("{steps} steps in {} s: {:?}", start.elapsed().as_secs(), soak.done);
        }
    }
    soak.look_at_all();
    soak.quit();
    println!("{steps} steps in {} s: {:?}", start.elapsed().as_secs(), soak.done);
}
