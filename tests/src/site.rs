//! A guest with disks and checkpoints whose host fails, or whose process is killed, at a step that the
//! test chooses. The guest's chains notice whatever is not of one moment.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::baremetal::chains::Chains;
use crate::baremetal::virtio::Driver;
use crate::baremetal::{Monitor, machine, monitor};
use crate::disk::{Disk, qemu_img};
use crate::events::target;
use crate::faults::{Call, Kind, Plan};
use crate::vm::{Vm, VmSpec};

const PATIENCE: Duration = Duration::from_secs(120);
const CHAINS: Chains = Chains { pages: 1000 };

/// The checkpoint that is there from the beginning.
pub const KEPT: &str = "kept";

/// What came of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It was done.
    Done,
    /// It failed with this error.
    Failed(String),
    /// The process has ended.
    Killed,
}

/// A machine, its images, and what is watched of it.
pub struct Site {
    dir: TempDir,
    spec: VmSpec,
    /// The images, node disk0 first, which has the VM state.
    pub disks: Vec<Disk>,
    running: Option<(Vm, Monitor, Client)>,
    jobs: u32,
}

impl Site {
    /// A running guest on so many disks, saved as [`KEPT`].
    pub fn new(disks: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = |n: usize| Disk::qcow2(dir.path().join(format!("disk{n}.qcow2")), "16M");
        let disks: Vec<Disk> = (0..disks).map(image).collect();
        let spec = disks.iter().fold(machine(dir.path(), "32M", 3), VmSpec::disk).supervised();
        let mut site = Self { dir, spec, disks, running: None, jobs: 0 };
        let vm = site.spec.start();
        let mut guest = monitor(&vm);
        for slot in 1..site.disks.len() as u64 {
            assert_eq!(Driver::start_at(&mut guest, slot).transfer(1, slot), 0);
        }
        CHAINS.start(&mut guest);
        site.running = Some((vm.qmp(), vm, guest)).map(|(qmp, vm, guest)| (vm, guest, qmp));
        assert_eq!(site.job("snapshot-save", KEPT), End::Done);
        site.go_on();
        site
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The nodes' names.
    pub fn nodes(&self) -> Vec<String> {
        (0..self.disks.len()).map(|n| format!("disk{n}")).collect()
    }

    /// The process.
    pub fn vm(&self) -> &Vm {
        &self.running.as_ref().expect("the machine does not run").0
    }

    /// A session that sees all events.
    pub fn qmp(&mut self) -> &mut Client {
        &mut self.running.as_mut().expect("the machine does not run").2
    }

    /// A new process, with the guest of a checkpoint.
    pub fn start(&mut self, tag: &str) {
        let vm = self.spec.clone().args(&["--loadvm", tag]).start();
        let (guest, qmp) = (Monitor::connect(vm.serial_path()), vm.qmp());
        self.running = Some((vm, guest, qmp));
        self.go_on();
    }

    /// The guest runs, and all that it reads is of one moment.
    pub fn go_on(&mut self) {
        let (vm, guest, _) = self.running.as_mut().expect("the machine does not run");
        let goes_on = catch_unwind(AssertUnwindSafe(|| CHAINS.go_on(guest)));
        if let Err(panic) = goes_on {
            eprintln!("status {}, stderr:\n{}", vm.status(), vm.stderr());
            resume_unwind(panic);
        }
        assert_eq!(vm.status(), "running");
    }

    /// The guest runs; its disk may give it errors.
    pub fn memory_goes_on(&mut self) {
        let (vm, guest, _) = self.running.as_mut().expect("the machine does not run");
        CHAINS.memory_goes_on(guest);
        assert_eq!(vm.status(), "running");
    }

    /// Whether the guest stops for memory that cannot be read, before it has looked at all of it once more. Then
    /// `stopped` is to have it go on.
    pub fn stops_for_memory(&mut self, stopped: impl FnOnce(&Vm, &mut Client)) -> bool {
        let (vm, guest, qmp) = self.running.as_mut().expect("the machine does not run");
        thread::scope(|scope| {
            let looking = scope.spawn(|| CHAINS.memory_goes_on(guest));
            while !looking.is_finished() {
                // An event tells the one, the guest the other: whichever is first.
                if qmp.execute("query-status", json!({})).unwrap()["status"] == "io-error" {
                    stopped(vm, qmp);
                    return true;
                }
            }
            false
        })
    }

    /// Runs a job over all disks.
    pub fn job(&mut self, command: &str, tag: &str) -> End {
        self.jobs += 1;
        let (id, nodes) = (format!("job{}", self.jobs), self.nodes());
        let names: Vec<&str> = nodes.iter().map(String::as_str).collect();
        let mut arguments = target(tag, &names);
        if command == "snapshot-delete" {
            arguments = json!({ "tag": tag, "devices": names });
        }
        arguments["job-id"] = json!(id);
        match self.qmp().run_job(command, arguments, PATIENCE) {
            Ok(()) => End::Done,
            Err(ClientError::Job { error, .. }) => End::Failed(error),
            Err(ClientError::Closed | ClientError::Io(_)) => End::Killed,
            Err(error) => panic!("{command}: {error}; stderr:\n{}", self.vm().stderr()),
        }
    }

    /// The same, of which calls are watched.
    pub fn watched(&mut self, plan: Plan, command: &str, tag: &str) -> (End, Vec<Call>) {
        self.vm().faults().watch(plan);
        let end = self.job(command, tag);
        (end, self.vm().faults().end())
    }

    /// The tags on each node, as the program has them.
    pub fn tags(&mut self) -> Vec<Vec<String>> {
        let nodes = self.qmp().execute("query-named-block-nodes", json!({})).unwrap();
        let of = |name: &String| {
            let nodes = nodes.as_array().unwrap();
            let node = nodes.iter().find(|node| node["node-name"] == name.as_str()).unwrap();
            let snapshots = node["image"]["snapshots"].as_array().cloned().unwrap_or_default();
            snapshots.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
        };
        self.nodes().iter().map(of).collect()
    }

    /// On how many nodes a tag is.
    pub fn count(&mut self, tag: &str) -> usize {
        self.tags().iter().filter(|tags| tags.iter().any(|there| there == tag)).count()
    }

    /// Ends the process at once, unless it has ended. Whatever is wrong with the images are leaks.
    pub fn kill(&mut self) {
        let (mut vm, guest, _) = self.running.take().expect("the machine does not run");
        drop(guest);
        vm.signal(libc::SIGKILL);
        vm.wait();
        self.mend();
    }

    /// Panics if something is wrong with the images but leaks; takes these back.
    pub fn mend(&self) {
        for disk in &self.disks {
            only_leaks(disk);
            qemu_img(&["check", "-q", "-r", "leaks", &disk.file()]);
            disk.check();
        }
    }

    /// Ends the guest's chains, which found nothing, and the process; nothing is wrong with the images.
    pub fn finish(mut self) {
        let (vm, mut guest, _) = self.running.take().expect("the machine does not run");
        CHAINS.stop(&mut guest);
        drop(guest);
        vm.quit();
        self.mend();
    }
}

/// `qemu-img check`: whatever it finds are leaks.
pub fn only_leaks(disk: &Disk) {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "-f", "qcow2", &disk.file()])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["corruptions"].is_null() && report["check-errors"] == 0, "{report}");
    assert!(matches!(output.status.code(), Some(0 | 3)), "{report}");
}

/// The places to try, of a job that made these calls: all where `IO_FAULTS` is "all", else `sample` of them. Those
/// from the first flush on are the same each time; of those before, which are the guest's RAM, there may be fewer.
pub fn places(calls: &[Call], sample: usize) -> Vec<(Option<Kind>, u64)> {
    let first = calls.iter().position(|call| call.kind == Kind::Flush).unwrap_or(calls.len());
    let all = std::env::var("IO_FAULTS").as_deref() == Ok("all");
    let spread = |count: usize, sample: usize| {
        let sample = if all { count } else { sample.min(count) };
        (0..sample).map(move |n| (n * count / sample) as u64)
    };
    let early = spread(first, sample / 3).map(|step| (None, step));
    let late = spread(calls.len() - first, sample - sample / 3);
    early.chain(late.map(|step| (Some(Kind::Flush), step))).collect()
}
