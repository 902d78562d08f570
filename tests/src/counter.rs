//! A guest of a few instructions that boots in milliseconds, for tests that need a running guest
//! and no operating system: it counts in its RAM the bytes that come over the serial port, and
//! answers each with the count. A count that goes on tells that the guest runs and that its memory
//! is its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};

use crate::pattern;
use crate::vm::{Vm, VmSpec};

/// How long the guest may take to answer, and a job to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where the code is, its count, and the ballast.
const CODE: u64 = 0x10_0000;
const COUNT: u64 = 0x1000;
const BALLAST: u64 = 0x20_0000;

/// Entered as a 64-bit kernel. `docs/boot.md` has the state it finds.
const MACHINE_CODE: [u8; 31] = [
    0xba, 0xfd, 0x03, 0x00, 0x00, //       mov edx, 0x3fd        line status
    0xec, //                         wait: in al, dx
    0xa8, 0x01, //                         test al, 1            data ready
    0x74, 0xfb, //                         jz wait
    0xba, 0xf8, 0x03, 0x00, 0x00, //       mov edx, 0x3f8        data
    0xec, //                               in al, dx
    0xfe, 0x05, 0xea, 0x0f, 0x00, 0x00, // inc byte [COUNT]
    0x8a, 0x05, 0xe4, 0x0f, 0x00, 0x00, // mov al, [COUNT]
    0xee, //                               out dx, al
    0xeb, 0xe1, //                         jmp start
];

/// The guest as an ELF kernel, with `ballast` bytes (whole pages) that take space in a checkpoint.
pub fn kernel(ballast: usize) -> Vec<u8> {
    const DATA: usize = 0x1000;
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let segment = |at: u64, address: u64, file: u64, memory: u64| -> Vec<u8> {
        words(&[1 | 7 << 32, at, address, address, file, memory, 0x1000])
    };
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable for x86-64, version 1, the entry, and two program headers behind this header.
    let header: Vec<u8> = words(&[2 | 62 << 16 | 1 << 32, CODE, 64, 0, 64 << 32 | 56 << 48, 2]);
    file.extend(&header[..48]);
    file.extend(segment(DATA as u64, CODE, MACHINE_CODE.len() as u64, COUNT + 0x1000));
    let ballast_at = DATA + 0x1000;
    file.extend(segment(ballast_at as u64, BALLAST, ballast as u64, ballast.max(0x1000) as u64));
    file.resize(DATA, 0);
    file.extend(MACHINE_CODE);
    file.resize(ballast_at, 0);
    file.extend(pattern::bytes(42, 0, ballast));
    file
}

/// A machine of 64 MiB with this guest and no disk; the kernel's file is put into `dir`.
pub fn spec(dir: &Path, ballast: usize) -> VmSpec {
    spec_with(dir, ballast, "64M", 1)
}

/// The same with other RAM and vCPUs. Only the first one does something.
pub fn spec_with(dir: &Path, ballast: usize, ram: &str, vcpus: u8) -> VmSpec {
    let path = dir.join("counter.elf");
    std::fs::write(&path, kernel(ballast)).unwrap();
    VmSpec::new(ram, vcpus).args(&["--kernel", &path.display().to_string()])
}

/// A running guest that jobs are refused on, with a QMP session that sees every event.
pub struct Running {
    /// The machine.
    pub vm: Vm,
    /// The session.
    pub qmp: Client,
    serial: UnixStream,
    count: Option<u8>,
    jobs: u32,
}

impl Running {
    /// Starts the machine, and waits until the guest answers.
    pub fn start(spec: &VmSpec) -> Self {
        let vm = spec.start();
        let qmp = vm.qmp();
        let serial = UnixStream::connect(vm.serial_path()).unwrap();
        serial.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut running = Self { vm, qmp, serial, count: None, jobs: 0 };
        running.check_alive();
        running
    }

    /// The guest's next count.
    pub fn next_count(&mut self) -> u8 {
        self.serial.write_all(b"?").unwrap();
        let mut answer = [0];
        self.serial.read_exact(&mut answer).unwrap_or_else(|error| {
            panic!("the guest is silent: {error}; stderr:\n{}", self.vm.stderr())
        });
        answer[0]
    }

    /// Panics unless the guest runs and its memory is as it was the last time.
    pub fn check_alive(&mut self) {
        let count = self.next_count();
        if let Some(before) = self.count {
            assert_eq!(count, before.wrapping_add(1), "the guest's memory is not its own");
        }
        self.count = Some(count);
        let status = self.qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status, json!({ "status": "running", "running": true }));
    }

    /// After a load the count is that of the save.
    pub fn expect_count(&mut self, last: u8) {
        self.count = Some(last);
        self.check_alive();
    }

    /// What the guest counted last.
    pub fn count(&self) -> u8 {
        self.count.unwrap()
    }

    /// Runs a job; gives its error, and the names of the events besides those of the job.
    pub fn job(
        &mut self,
        command: &str,
        mut arguments: Value,
    ) -> (Result<(), String>, Vec<String>) {
        self.jobs += 1;
        arguments["job-id"] = json!(format!("job{}", self.jobs));
        self.qmp.take_events();
        let result = match self.qmp.run_job(command, arguments, PATIENCE) {
            Ok(()) => Ok(()),
            Err(ClientError::Job { error, .. }) => Err(error),
            Err(error) => panic!("{command}: {error}; stderr:\n{}", self.vm.stderr()),
        };
        let events = self.qmp.take_events();
        let names = events.iter().map(|event| event["event"].as_str().unwrap().to_owned());
        (result, names.filter(|name| name != "JOB_STATUS_CHANGE").collect())
    }

    /// Runs a job that must be refused before the guest is touched; gives its error.
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        let what = format!("{command} {arguments}");
        let (result, events) = self.job(command, arguments);
        let Err(error) = result else { panic!("{what}: not refused") };
        assert!(events.is_empty(), "{what}: {error}: {events:?}");
        self.check_alive();
        error
    }

    /// Runs a job that must work, and whose guest goes on.
    pub fn done(&mut self, command: &str, arguments: Value) {
        let what = format!("{command} {arguments}");
        let (result, _) = self.job(command, arguments);
        assert_eq!(result, Ok(()), "{what}");
    }
}

/// Arguments of snapshot-save and snapshot-load, with the VM state on the first device.
pub fn snapshot(tag: &str, devices: &[&str]) -> Value {
    json!({ "tag": tag, "vmstate": devices[0], "devices": devices })
}
