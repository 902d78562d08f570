//! A storage daemon, ours (`--machine none`) or QEMU's, driven over QMP. Needs no KVM.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use qmp::client::{Client, ClientError};
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Awaited, Watch, wait_for_end};
use crate::seccomp;
use crate::vm::binary;

/// How long a daemon may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    client: Client,
    dir: TempDir,
}

/// Whether QEMU's storage daemon is there to compare with; says so where it is not.
pub fn have_qemu(test: &str) -> bool {
    let found = Command::new("qemu-storage-daemon").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED {test}: qemu-storage-daemon is not installed");
    }
    found
}

impl Daemon {
    /// Ours.
    pub fn start(args: &[&str]) -> Self {
        Self::prepared(binary().as_path(), args, own_monitor, |_, _| {})
    }

    /// Ours in a process that the kernel refuses io_uring; what it says on stderr goes to the file
    /// "stderr" of [`Daemon::path`].
    pub fn start_without_io_uring(args: &[&str]) -> Self {
        Self::prepared(binary().as_path(), args, own_monitor, |command, dir| {
            command.stderr(std::fs::File::create(dir.join("stderr")).unwrap());
            seccomp::refuse_io_uring(command);
        })
    }

    /// QEMU's.
    pub fn start_qemu(args: &[&str]) -> Self {
        let monitor = |socket: &Path| {
            let chardev = format!("socket,id=m,path={},server=on,wait=off", socket.display());
            ["--chardev", &chardev, "--monitor", "chardev=m"].map(str::to_owned).to_vec()
        };
        Self::prepared(Path::new("qemu-storage-daemon"), args, monitor, |_, _| {})
    }

    fn prepared(
        program: &Path,
        args: &[&str],
        monitor: impl Fn(&Path) -> Vec<String>,
        prepare: impl FnOnce(&mut Command, &Path),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let mut watch = Watch::new(dir.path());
        let mut command = Command::new(program);
        command.args(args).args(monitor(&socket)).stdin(Stdio::null()).stdout(Stdio::null());
        prepare(&mut command, dir.path());
        let child = command.spawn().unwrap();
        assert_eq!(watch.wait(&socket, &child, PATIENCE), Awaited::File, "{args:?}");
        let client = connect(&socket);
        Self { child, client, dir }
    }

    /// A place for files that go with the daemon.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command, which must succeed.
    #[track_caller]
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let text = arguments.to_string();
        match self.client.execute(command, arguments) {
            Ok(value) => value,
            Err(error) => panic!("{command} {text}: {error}"),
        }
    }

    /// Runs a command; its error's text where it fails.
    pub fn try_qmp(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        match self.client.execute(command, arguments) {
            Ok(value) => Ok(value),
            Err(ClientError::Command(error)) => Err(error.desc),
            Err(other) => panic!("{command}: {other}"),
        }
    }

    /// The events that came so far: name and data.
    pub fn events(&mut self) -> Vec<(String, Value)> {
        let events = self.client.take_events();
        let pair = |event: Value| {
            (event["event"].as_str().unwrap_or_default().to_owned(), event["data"].clone())
        };
        events.into_iter().map(pair).collect()
    }

    /// Sends a signal and waits for the end.
    pub fn signal(mut self, signal: libc::c_int) -> ExitStatus {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: a signal to a child that was not waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        assert!(wait_for_end(&self.child, PATIENCE), "it does not end");
        self.child.wait().unwrap()
    }

    /// `quit`; waits for the end.
    pub fn quit(mut self) -> ExitStatus {
        self.qmp("quit", serde_json::json!({}));
        assert!(wait_for_end(&self.child, PATIENCE), "it does not end");
        self.child.wait().unwrap()
    }
}

fn own_monitor(socket: &Path) -> Vec<String> {
    let qmp = format!("unix:{},server=on,wait=off", socket.display());
    ["--machine", "none", "--qmp", &qmp].map(str::to_owned).to_vec()
}

/// A socket is there a moment before it is listened on.
fn connect(socket: &Path) -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Client::connect(socket) {
            Ok(client) => return client,
            Err(ClientError::Connect { source, .. })
                if source.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline =>
            {
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
