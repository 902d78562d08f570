//! A `tardigrade` process.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::Agent;
use crate::disk::Disk;
use crate::faults::{Faults, Supervisor};
use crate::process::{Awaited, Watch, wait_for_end};
use crate::repo;
use crate::seccomp;

/// How long a machine may take to start, to finish a job, or to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the guest's kernel needs on its command line; see `docs/guest.md`.
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 rodata=off \
    clearcpuid=smap,smep,xsave,cx16,fsgsbase,rdpid,invpcid,pcid,umip,rdseed,rdrand,clflushopt,\
clwb,erms,fsrm,popcnt";

/// The binary under test: `TARDIGRADE`, or the one beside the tests' own directory.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("TARDIGRADE") {
        return path.into();
    }
    let me = std::env::current_exe().unwrap();
    let found = me.ancestors().map(|dir| dir.join("tardigrade")).find(|path| path.is_file());
    found.expect("tardigrade is not built: run 'cargo build' first, or 'make test'")
}

/// A machine to be started.
#[derive(Clone)]
pub struct VmSpec {
    args: Vec<String>,
    env: Vec<(String, PathBuf)>,
    disks: Vec<Disk>,
    without_userfaultfd: bool,
    supervised: bool,
}

impl VmSpec {
    /// A machine of which nothing is said.
    pub fn bare() -> Self {
        Self {
            args: Vec::new(),
            env: Vec::new(),
            disks: Vec::new(),
            without_userfaultfd: false,
            supervised: false,
        }
    }

    /// With [`Vm::faults`].
    pub fn supervised(mut self) -> Self {
        self.supervised = true;
        self
    }

    /// On a host that refuses userfaultfd.
    pub fn without_userfaultfd(mut self) -> Self {
        self.without_userfaultfd = true;
        self
    }

    /// A machine without a kernel.
    pub fn new(ram: &str, vcpus: u8) -> Self {
        let args = ["-m", ram, "--smp", &vcpus.to_string()].map(str::to_owned).to_vec();
        Self { args, ..Self::bare() }
    }

    /// A machine that boots the Linux guest.
    pub fn linux(ram: &str, vcpus: u8) -> Self {
        let kernel = repo("resources/guest/tiny.bzImage").display().to_string();
        let initrd = repo("resources/guest/agent.cpio").display().to_string();
        Self::new(ram, vcpus).args(&["--kernel", &kernel, "--initrd", &initrd, "--append", CMDLINE])
    }

    /// More options.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// An environment variable that names a path.
    #[must_use]
    pub fn env(mut self, name: &str, path: &Path) -> Self {
        self.env.push((name.to_owned(), path.to_owned()));
        self
    }

    /// Adds a disk as node `disk0`, `disk1`, ...
    #[must_use]
    pub fn disk(self, disk: &Disk) -> Self {
        self.disk_with(disk, "", "")
    }

    /// The same with more options, each with a comma before it, of its node and of its device.
    #[must_use]
    pub fn disk_with(mut self, disk: &Disk, node_options: &str, device_options: &str) -> Self {
        let node = format!("disk{}", self.disks.len());
        let blockdev = format!(
            "driver={},node-name={node},file.driver=file,file.filename={}{node_options}",
            disk.format,
            disk.file()
        );
        let device = format!("virtio-blk-device,drive={node},serial={node}{device_options}");
        self.disks.push(disk.clone());
        self.args(&["--blockdev", &blockdev, "--device", &device])
    }

    /// The arguments, as they are given to the program.
    pub fn arguments(&self) -> &[String] {
        &self.args
    }

    /// Starts the machine and waits for its sockets.
    pub fn start(&self) -> Vm {
        let dir = tempfile::tempdir().unwrap();
        let (qmp, serial) = (dir.path().join("qmp"), dir.path().join("serial"));
        let log = std::fs::File::create(dir.path().join("stderr")).unwrap();
        let mut sockets = Watch::new(dir.path());
        let mut command = Command::new(binary());
        if self.without_userfaultfd {
            seccomp::refuse_userfaultfd(&mut command);
        }
        let supervisor = self.supervised.then(|| Supervisor::of(&mut command));
        let child = command
            .args(&self.args)
            .envs(self.env.iter().cloned())
            .args(["--qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["--serial", &format!("unix:{},server=on,wait=off", serial.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let faults = supervisor.map(Supervisor::start);
        let (qmp_path, serial_path) = (qmp, serial);
        let mut vm = Vm { child, faults, dir, qmp_path, serial_path, next_job: 0 };
        vm.wait_for_sockets(&mut sockets);
        vm
    }

    /// Runs the machine to its end; gives its exit status and what it said on stderr.
    pub fn run(&self) -> (ExitStatus, String) {
        let output = Command::new(binary())
            .args(&self.args)
            .envs(self.env.iter().cloned())
            .args(["--serial", "null"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A running machine; killed when dropped.
pub struct Vm {
    child: Child,
    faults: Option<Faults>,
    dir: TempDir,
    qmp_path: PathBuf,
    serial_path: PathBuf,
    next_job: u32,
}

impl Vm {
    /// The QMP socket is the last thing that is made.
    fn wait_for_sockets(&mut self, sockets: &mut Watch) {
        match sockets.wait(&self.qmp_path, &self.child, PATIENCE) {
            // The file is there a moment before the program listens on it.
            Awaited::File => {
                while UnixStream::connect(&self.qmp_path).is_err() {
                    assert!(self.child.try_wait().unwrap().is_none(), "{}", self.stderr());
                    std::thread::yield_now();
                }
            }
            Awaited::End => {
                let status = self.child.wait().unwrap();
                panic!("tardigrade ended with {status}:\n{}", self.stderr());
            }
            Awaited::Nothing => panic!("no QMP socket:\n{}", self.stderr()),
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What makes its file calls fail, of a machine that is [`VmSpec::supervised`].
    pub fn faults(&self) -> &Faults {
        self.faults.as_ref().expect("the machine is not supervised")
    }

    /// The QMP socket.
    pub fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// The serial socket.
    pub fn serial_path(&self) -> &Path {
        &self.serial_path
    }

    /// A new QMP session.
    pub fn qmp(&self) -> Client {
        Client::connect(&self.qmp_path)
            .unwrap_or_else(|error| panic!("{error}; stderr:\n{}", self.stderr()))
    }

    /// A connection to the guest's agent. One at a time.
    pub fn agent(&self) -> Agent {
        Agent::connect(&self.serial_path)
    }

    /// What the program says on stderr, for a closure that must not borrow the machine.
    pub fn stderr_reader(&self) -> impl Fn() -> String + use<> {
        let path = self.dir.path().join("stderr");
        move || std::fs::read_to_string(&path).unwrap_or_default()
    }

    /// What the program said on stderr.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// Runs a snapshot job over `devices`, the first of which has the VM state.
    pub fn job(&mut self, command: &str, tag: &str, devices: &[&str]) -> Result<(), String> {
        let mut arguments = json!({ "tag": tag, "devices": devices });
        if command != "snapshot-delete" {
            arguments["vmstate"] = json!(devices.first().copied().unwrap_or_default());
        }
        self.job_with(command, arguments)
    }

    /// Runs a job with these arguments; gives its error.
    pub fn job_with(&mut self, command: &str, mut arguments: Value) -> Result<(), String> {
        self.next_job += 1;
        let id = format!("job{}", self.next_job);
        arguments["job-id"] = json!(id);
        match self.qmp().run_job(command, arguments, PATIENCE) {
            Ok(_) => Ok(()),
            Err(ClientError::Job { error, .. }) => Err(error),
            Err(error) => panic!("{command}: {error}; stderr:\n{}", self.stderr()),
        }
    }

    /// snapshot-save, which must work.
    pub fn save(&mut self, tag: &str, devices: &[&str]) {
        self.job("snapshot-save", tag, devices).unwrap();
    }

    /// snapshot-load, which must work.
    pub fn load(&mut self, tag: &str, devices: &[&str]) {
        self.job("snapshot-load", tag, devices).unwrap();
    }

    /// snapshot-delete, which must work.
    pub fn delete(&mut self, tag: &str, devices: &[&str]) {
        self.job("snapshot-delete", tag, devices).unwrap();
    }

    /// `query-status`'s status.
    pub fn status(&self) -> String {
        let status = self.qmp().execute("query-status", json!({})).unwrap();
        status["status"].as_str().unwrap().to_owned()
    }

    /// `quit`, and the end of the process, which must be a good one.
    pub fn quit(mut self) {
        self.qmp().execute("quit", json!({})).unwrap();
        let status = self.wait();
        assert!(status.success(), "tardigrade ended with {status}:\n{}", self.stderr());
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: the child has not been waited for, so the process id is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        let ended = wait_for_end(&self.child, PATIENCE);
        assert!(ended, "tardigrade does not end:\n{}", self.stderr());
        self.child.wait().unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
