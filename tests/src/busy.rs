//! A machine whose guest writes its disks all the time and knows what they must have, and block jobs
//! beside that.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};

use crate::baremetal::writer::{self, Writer};
use crate::baremetal::{Monitor, machine, monitor};
use crate::disk::Disk;
use crate::vm::Vm;

/// How long a job may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Blocks that the guest writes, in the first 16 MiB of each disk.
const BLOCKS: u64 = 256;
/// Steps in which about a third of the blocks is written.
const STEPS: u64 = 100;

/// Where the guest's blocks end, and what each disk has from there on: it is never written to, so a job has
/// something to do however fast the guest writes.
const END: usize = 16 << 20;
const TAIL: u8 = 0x77;
const TAIL_SIZE: usize = 4 << 20;

/// Bytes of a disk.
pub const SIZE: &str = "20M";
/// Bytes a second of a job that is not to be over before it is told to hurry.
pub const SLOW: u64 = 1 << 10;

/// The machine: a vCPU that answers, and one for each disk that writes.
pub struct Busy {
    /// The process.
    pub vm: Vm,
    /// The guest.
    pub guest: Monitor,
    /// A session that has seen all events of jobs.
    pub qmp: Client,
    dir: PathBuf,
    writers: Vec<Writer>,
}

impl Busy {
    /// With so many new disks in `dir`: node disk0 in disk0.qcow2, and so on.
    pub fn start(dir: &Path, disks: u8) -> Self {
        Self::start_with(dir, disks, "32M")
    }

    /// The same with that much memory.
    pub fn start_with(dir: &Path, disks: u8, ram: &str) -> Self {
        let vm = Self::machine(dir, disks, ram);
        let mut guest = monitor(&vm);
        let slots = 0..u64::from(disks);
        let writers: Vec<Writer> =
            slots.map(|slot| Writer::start(&mut guest, slot, BLOCKS)).collect();
        let mut busy = Self { qmp: vm.qmp(), vm, guest, dir: dir.to_owned(), writers };
        busy.goes_on();
        busy
    }

    fn machine(dir: &Path, disks: u8, ram: &str) -> Vm {
        let disk = |n: u8| {
            let disk = Disk::qcow2(dir.join(format!("disk{n}.qcow2")), SIZE);
            let write = format!("write -q -P {TAIL} {END} {TAIL_SIZE}");
            let status = Command::new("qemu-io").args(["-c", &write, &disk.file()]).status();
            assert!(status.unwrap().success());
            disk
        };
        (0..disks)
            .map(disk)
            .fold(machine(dir, ram, disks + 1), |spec, disk| spec.disk(&disk))
            .start()
    }

    /// After a reset: waits for the guest, whose disks must have nothing but whole blocks, and lets it
    /// write again.
    pub fn starts_again(&mut self) {
        self.guest.wait_started();
        let (guest, disks) = (&mut self.guest, self.writers.len() as u64);
        self.writers = (0..disks).map(|slot| Writer::take(guest, slot, BLOCKS)).collect();
    }

    /// Waits until a good part of each disk was written once more.
    pub fn goes_on(&mut self) {
        for writer in &self.writers {
            writer.goes_on(&mut self.guest, STEPS);
        }
    }

    /// Lets the guest read all of its disks, and write on.
    pub fn check(&mut self) {
        self.goes_on();
        self.stop_writing();
        self.writers.iter().for_each(|writer| writer.check(&mut self.guest));
        self.writers.iter().for_each(|writer| writer.resume(&mut self.guest));
    }

    /// Ends the guest's writing.
    pub fn stop_writing(&mut self) {
        self.writers.iter().for_each(|writer| writer.stop(&mut self.guest));
    }

    /// What each disk must have, when the writing has ended.
    pub fn contents(&mut self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for writer in &self.writers {
            let mut contents = writer.contents(&mut self.guest);
            assert_eq!(contents.len(), END);
            contents.resize(END + TAIL_SIZE, TAIL);
            all.push(contents);
        }
        all
    }

    /// The guest reads all of its disks for the last time; the machine ends. Gives what each disk must have.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        self.goes_on();
        self.stop_writing();
        self.writers.iter().for_each(|writer| writer.check(&mut self.guest));
        let contents = self.contents();
        self.vm.quit();
        contents
    }

    /// Runs a command, which must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let text = arguments.to_string();
        match self.qmp.execute(command, arguments) {
            Ok(value) => value,
            Err(error) => panic!("{command} {text}: {error}; stderr:\n{}", self.vm.stderr()),
        }
    }

    /// A new image of the disks' size in the directory, as a node.
    pub fn add_image(&mut self, node: &str) -> Disk {
        let disk = Disk::qcow2(self.dir.join(format!("{node}.qcow2")), SIZE);
        let file = json!({"driver": "file", "filename": disk.file()});
        self.run("blockdev-add", json!({"driver": "qcow2", "node-name": node, "file": file}));
        disk
    }

    /// Puts a new overlay over a node, and lets the guest write to it.
    pub fn add_overlay(&mut self, below: &str, node: &str) -> Disk {
        let path = self.dir.join(format!("{node}.qcow2"));
        let arguments = json!({
            "node-name": below, "snapshot-node-name": node,
            "snapshot-file": path.display().to_string(), "format": "qcow2",
        });
        self.run("blockdev-snapshot-sync", arguments);
        self.goes_on();
        Disk { path, format: "qcow2" }
    }

    /// Waits for a status of a job.
    #[track_caller]
    pub fn wait_status(&mut self, id: &str, status: &str) {
        let wanted = |event: &Value| {
            event["event"] == "JOB_STATUS_CHANGE"
                && event["data"]["id"] == id
                && event["data"]["status"] == status
        };
        self.wait(wanted, &format!("job {id} is not {status}"));
    }

    /// Waits for the event with this job's id as device, which comes once; gives its data.
    #[track_caller]
    pub fn wait_job_event(&mut self, name: &str, id: &str) -> Value {
        let wanted = |event: &Value| event["event"] == name && event["data"]["device"] == id;
        self.wait(wanted, &format!("no {name} of job {id}"))["data"].take()
    }

    #[track_caller]
    fn wait(&mut self, wanted: impl FnMut(&Value) -> bool, otherwise: &str) -> Value {
        match self.qmp.wait_event(PATIENCE, wanted) {
            Ok(event) => event,
            Err(error) => {
                let (jobs, told) =
                    (self.qmp.execute("query-jobs", json!({})), self.qmp.take_events());
                panic!("{otherwise}: {error}; {jobs:?}\n{told:?}\n{}", self.vm.stderr())
            }
        }
    }

    /// Lets a slow job of that id have guest writes beside it, then no limit of speed.
    pub fn hurry(&mut self, id: &str) {
        self.goes_on();
        self.run("block-job-set-speed", json!({"device": id, "speed": 0}));
    }

    /// Waits for the good end of a job.
    #[track_caller]
    pub fn wait_completed(&mut self, id: &str) {
        let data = self.wait_job_event("BLOCK_JOB_COMPLETED", id);
        assert_eq!(data["error"], Value::Null, "{data}");
        assert_eq!(data["offset"], data["len"], "{data}");
        self.wait_status(id, "null");
    }

    /// The node that each device uses.
    pub fn used_nodes(&mut self) -> Vec<String> {
        let blocks = self.run("query-block", json!({}));
        let name = |block: &Value| block["inserted"]["node-name"].as_str().unwrap().to_owned();
        blocks.as_array().unwrap().iter().map(name).collect()
    }

    /// Whether there is a node of that name.
    pub fn has_node(&mut self, name: &str) -> bool {
        let nodes = self.run("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().iter().any(|node| node["node-name"] == name)
    }

    /// The names of all jobs.
    pub fn jobs(&mut self) -> Vec<String> {
        let jobs = self.run("query-jobs", json!({}));
        jobs.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    }

    /// All events up to the end of the session, which the end of the process is; it must be a good one.
    pub fn end(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        let error = loop {
            match self.qmp.wait_event(PATIENCE, |_| true) {
                Ok(event) => events.push(event),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, ClientError::Closed), "{error}: {events:?}");
        let status = self.vm.wait();
        assert!(status.success(), "{status}: {}", self.vm.stderr());
        events
    }
}

/// Panics unless the image is without a fault, and has only whole blocks.
pub fn check_whole(disk: &Disk) {
    disk.check();
    let found = disk.read(None);
    let (blocks, tail) = found.split_at(END);
    writer::check_whole(blocks);
    assert!(tail.iter().all(|byte| *byte == TAIL), "{disk:?}: behind the blocks");
}

/// Panics unless the image is without a fault, and has these contents.
pub fn check_image(disk: &Disk, contents: &[u8]) {
    disk.check();
    let found = disk.read(None);
    assert_eq!(found.len(), contents.len(), "{disk:?}");
    let wrong = found.iter().zip(contents).position(|(found, wanted)| found != wanted);
    assert_eq!(wrong, None, "{disk:?}: the first wrong byte");
}
