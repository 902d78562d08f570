//! The two programs: how each is started.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tardigrade_tests::baremetal::{Monitor, image};
use tardigrade_tests::counter;
use tardigrade_tests::process::{Awaited, Watch, wait_for_end};
use tardigrade_tests::vm::binary;

use crate::file::Transcript;

/// How long a program may take to do anything. Who writes a transcript wants to hear sooner of an
/// answer that does not come.
pub(crate) fn patience() -> Duration {
    Duration::from_secs(if std::env::var_os("TRANSCRIPT").is_some() { 5 } else { 120 })
}

/// Which program a transcript is of.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Program {
    /// `qemu-storage-daemon`, and ours with `--machine none`.
    StorageDaemon,
    /// `qemu-system-x86_64 -M none`, and ours with `--machine none`.
    None,
    /// `qemu-system-x86_64 -M microvm` with its firmware, and ours with a guest that waits.
    Microvm,
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Qemu,
}

/// What a transcript needs.
pub(crate) struct Pair {
    pub(crate) qemu: &'static str,
    pub(crate) needs_kvm: bool,
}

impl Program {
    pub(crate) fn pair(self) -> Pair {
        match self {
            Self::StorageDaemon => Pair { qemu: "qemu-storage-daemon", needs_kvm: false },
            Self::None => Pair { qemu: "qemu-system-x86_64", needs_kvm: false },
            Self::Microvm => Pair { qemu: "qemu-system-x86_64", needs_kvm: true },
        }
    }

    fn qemu(self, dir: &Path, socket: &Path, guest: bool) -> Command {
        let mut command = Command::new(self.pair().qemu);
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", socket.display());
        command.args(["--chardev", &chardev]);
        match self {
            Self::StorageDaemon => command.args(["--monitor", "chardev=qmp"]),
            Self::None => command.args(["-mon", "chardev=qmp,mode=control", "-M", "none"]),
            Self::Microvm => command
                // Without ACPI it has another firmware, which enters a kernel at once.
                .args(["-M", if guest { "microvm,acpi=off" } else { "microvm" }])
                .args(["-mon", "chardev=qmp,mode=control", "-accel", "kvm"])
                .args(["-cpu", "qemu64", "-m", "64M"]),
        };
        if !matches!(self, Self::StorageDaemon) {
            command.args(["-nodefaults", "-display", "none", "-no-user-config"]);
        }
        if guest {
            command.args(["-global", "virtio-mmio.force-legacy=false"]);
            command.args(["-kernel", &kernel(dir, true), "-serial", &serial(dir)]);
        }
        command
    }

    fn ours(self, dir: &Path, socket: &Path, guest: bool) -> Command {
        let mut command = Command::new(binary());
        command.args(["--qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        match self {
            Self::StorageDaemon | Self::None => command.args(["--machine", "none"]),
            Self::Microvm => {
                let serial = if guest { serial(dir) } else { "null".to_owned() };
                command.args(["-m", "64M", "--serial", &serial, "--kernel", &kernel(dir, guest)])
            }
        };
        command
    }
}

/// Writes the kernel that waits, or the one that does what it is told over the serial port.
fn kernel(dir: &Path, guest: bool) -> String {
    let path = dir.join("guest.elf");
    std::fs::write(&path, if guest { image::elf() } else { counter::kernel(0) }).unwrap();
    path.display().to_string()
}

fn serial(dir: &Path) -> String {
    format!("unix:{},server=on,wait=on", dir.join("serial").display())
}

/// A running program; killed when dropped.
pub(crate) struct Running {
    child: Child,
    dir: PathBuf,
    /// The guest, where there is one that can be talked to.
    pub(crate) guest: Option<Monitor>,
}

impl Running {
    /// Starts one of the two in `dir`, and connects to it.
    pub(crate) fn start(
        transcript: &Transcript,
        side: Side,
        dir: &Path,
    ) -> Result<(Self, UnixStream), String> {
        let socket = dir.join("qmp.sock");
        let (mut command, more) = match side {
            Side::Ours => {
                (transcript.program.ours(dir, &socket, transcript.guest), &transcript.our_args)
            }
            Side::Qemu => {
                (transcript.program.qemu(dir, &socket, transcript.guest), &transcript.qemu_args)
            }
        };
        let own = |arg: &String| arg.replace("$DIR", dir.to_str().unwrap());
        command.args(transcript.args.iter().map(own)).args(more.iter().map(own));
        command.current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(dir.join("stderr")).unwrap());
        let mut watch = Watch::new(dir);
        let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
        let mut running = Self { child, dir: dir.to_owned(), guest: None };
        if transcript.guest {
            // It waits for us: what is said to a guest that is not there yet may be lost.
            let stream = running.connect(&mut watch, &dir.join("serial"))?;
            let guest = running.guest.insert(Monitor::new(stream));
            guest.wait_started();
        }
        let stream = running.connect(&mut watch, &socket)?;
        Ok((running, stream))
    }

    fn connect(&self, watch: &mut Watch, socket: &Path) -> Result<UnixStream, String> {
        if watch.wait(socket, &self.child, patience()) != Awaited::File {
            return Err(format!("it does not start: {}", self.stderr()));
        }
        // The file is there a moment before the program listens.
        let deadline = Instant::now() + patience();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                Err(error)
                    if error.kind() == ErrorKind::ConnectionRefused
                        && Instant::now() < deadline =>
                {
                    std::thread::yield_now();
                }
                Err(error) => return Err(format!("connect: {error}: {}", self.stderr())),
            }
        }
    }

    /// What it said on stderr.
    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.join("stderr")).unwrap_or_default()
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> Result<ExitStatus, String> {
        match wait_for_end(&self.child, patience()) {
            true => Ok(self.child.wait().unwrap()),
            false => Err("the program does not end".to_owned()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
