//! The two programs, started with the same options.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::Monitor;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Tardigrade,
    Qemu,
    /// QEMU with O_DIRECT for the image, as our VM state is read and written.
    QemuDirect,
}

impl Program {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tardigrade => "Tardigrade",
            Self::Qemu => "QEMU",
            Self::QemuDirect => "QEMU direct",
        }
    }

    /// The program with one vCPU, that RAM, that kernel, and nothing else.
    pub(crate) fn command(self, kernel: &Path, ram: u64) -> Command {
        let mut command = match self {
            Self::Tardigrade => Command::new(tardigrade()),
            Self::Qemu | Self::QemuDirect => {
                let mut command = Command::new("qemu-system-x86_64");
                command.args(["-M", "microvm,pit=off,pic=off", "-accel", "kvm"]);
                command.args(["-cpu", "host,-arch-capabilities"]);
                command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
                command
            }
        };
        command.args(["-m", &format!("{ram}M")]).arg("--kernel").arg(kernel);
        command.stdin(Stdio::null()).stderr(Stdio::inherit());
        command
    }

    /// What the image's node has beyond its name and file.
    fn cache_options(self) -> &'static str {
        match self {
            Self::Tardigrade | Self::Qemu => "",
            Self::QemuDirect => ",cache.direct=on",
        }
    }
}

/// The release build: the one beside this program.
pub(crate) fn tardigrade() -> PathBuf {
    tardigrade_tests::vm::binary()
}

/// What QEMU says of itself, where it is installed.
pub(crate) fn qemu_version() -> Option<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

/// A running machine with a qcow2 disk as node `disk0`; killed when dropped.
pub(crate) struct Machine {
    child: Child,
    qmp: PathBuf,
    serial: PathBuf,
    jobs: u32,
    /// The nodes of its checkpoints.
    disks: Vec<String>,
}

impl Machine {
    /// Starts it and waits until it can be talked to.
    pub(crate) fn start(program: Program, mut command: Command, image: &Path, dir: &Path) -> Self {
        let (qmp, serial) = (dir.join("qmp"), dir.join("serial"));
        for socket in [&qmp, &serial] {
            // It may be the first.
            let _ = std::fs::remove_file(socket);
        }
        let child = command
            .arg("--blockdev")
            .arg(format!(
                "driver=qcow2,node-name=disk0,file.driver=file,file.filename={}{}",
                image.display(),
                program.cache_options()
            ))
            .args(["--device", "virtio-blk-device,drive=disk0"])
            .args(["--qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["--serial", &format!("unix:{},server=on,wait=off", serial.display())])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let machine = Self { child, qmp, serial, jobs: 0, disks: Vec::new() }.with_disks(1);
        let deadline = Instant::now() + PATIENCE;
        // Who greets has made both sockets.
        while Client::connect_with(&machine.qmp, PATIENCE).is_err() {
            assert!(Instant::now() < deadline, "the machine does not start");
            std::thread::sleep(Duration::from_micros(200));
        }
        machine
    }

    /// Its checkpoints are of so many disks, `disk0`, `disk1`, ...
    pub(crate) fn with_disks(mut self, count: usize) -> Self {
        self.disks = (0..count).map(|n| format!("disk{n}")).collect();
        self
    }

    pub(crate) fn monitor(&self) -> Monitor {
        let mut monitor = Monitor::connect(&self.serial);
        monitor.tsc();
        monitor
    }

    pub(crate) fn serial_path(&self) -> &Path {
        &self.serial
    }

    pub(crate) fn qmp_path(&self) -> &Path {
        &self.qmp
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect_with(&self.qmp, PATIENCE).unwrap()
    }

    /// Runs a snapshot job; gives the time from command to conclusion.
    pub(crate) fn job(&mut self, command: &str, tag: &str) -> Duration {
        let mut qmp = self.connect();
        self.job_on(&mut qmp, command, tag)
    }

    /// Bytes that were put back by loads of the checkpoint that the guest ran from; none of QEMU.
    pub(crate) fn rewound(&self) -> Option<u64> {
        let told = self.connect().execute("x-query-load", json!({})).ok()?;
        told["rewound"].as_u64()
    }

    /// As [`Machine::job`], on a connection that is there.
    pub(crate) fn job_on(&mut self, qmp: &mut Client, command: &str, tag: &str) -> Duration {
        self.run_job(qmp, command, tag, &json!({ "vmstate": "disk0" }))
    }

    /// As [`Machine::job`] for a save or a load, with arguments that only ours has.
    pub(crate) fn job_with(&mut self, command: &str, tag: &str, more: &Value) -> Duration {
        let mut qmp = self.connect();
        self.job_on_with(&mut qmp, command, tag, more)
    }

    /// The same on a connection that is there.
    pub(crate) fn job_on_with(
        &mut self,
        qmp: &mut Client,
        command: &str,
        tag: &str,
        more: &Value,
    ) -> Duration {
        let mut arguments = more.clone();
        arguments["vmstate"] = json!("disk0");
        self.run_job(qmp, command, tag, &arguments)
    }

    /// Deletes a checkpoint.
    pub(crate) fn delete(&mut self, tag: &str) {
        let mut qmp = self.connect();
        self.run_job(&mut qmp, "snapshot-delete", tag, &json!({}));
    }

    fn run_job(&mut self, qmp: &mut Client, command: &str, tag: &str, more: &Value) -> Duration {
        self.jobs += 1;
        let mut arguments = more.clone();
        arguments["job-id"] = json!(format!("job{}", self.jobs));
        arguments["tag"] = json!(tag);
        arguments["devices"] = json!(self.disks);
        let start = Instant::now();
        qmp.run_job(command, arguments, PATIENCE).unwrap();
        start.elapsed()
    }

    /// How long the last save kept the guest standing, by the program's own count, in milliseconds.
    pub(crate) fn last_pause(&self) -> f64 {
        let told = self.connect().execute("x-query-checkpoint-stats", json!({})).unwrap();
        told["last-pause-ns"].as_f64().unwrap() / 1e6
    }

    /// Bytes that the process had written to disks so far.
    pub(crate) fn bytes_written(&self) -> u64 {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.child.id())).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        line.unwrap().parse().unwrap()
    }

    pub(crate) fn quit(mut self) {
        self.connect().execute("quit", json!({})).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
