//! The demo's machine: a process of this same program, with the guest's agent on its serial port.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp::client::Client;

use super::{DISK, DemoError, Error};

/// How long anything may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// What the guest's kernel is told; `docs/guest.md` says why.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 rodata=off \
    clearcpuid=smap,smep,xsave,cx16,fsgsbase,rdpid,invpcid,pcid,umip,rdseed,rdrand,clflushopt,\
clwb,erms,fsrm,popcnt";

/// Kernel and initramfs.
pub(super) struct GuestFiles {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl GuestFiles {
    pub(super) fn find(dir: &Path) -> Result<Self, DemoError> {
        let file = |name| {
            let path: PathBuf = dir.join(name);
            if path.is_file() { Ok(path) } else { Err(DemoError::NoGuest(path)) }
        };
        Ok(Self { kernel: file("tiny.bzImage")?, initrd: file("initramfs.cpio")? })
    }
}

/// Runs `qemu-img`; gives what it prints.
pub(super) fn qemu_img(args: &[&str]) -> Result<String, DemoError> {
    let failed = |reason| DemoError::Program { program: "qemu-img", reason };
    let output = Command::new("qemu-img").args(args).output();
    let output = output.map_err(|error| failed(format!("{error} (Debian package qemu-utils)")))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

/// A running guest; killed when dropped.
pub(super) struct Guest {
    child: Child,
    /// When the process was started.
    pub(super) started: Instant,
    serial: BufReader<UnixStream>,
    qmp_path: PathBuf,
    log: PathBuf,
    questions: u32,
}

impl Guest {
    /// Boots, and waits until the agent is there.
    pub(super) fn boot(files: &GuestFiles, dir: &Path, image: &Path) -> Result<Self, Error> {
        let mut guest = Self::start(files, dir, image, &[])?;
        guest.wait_line(|line| (line == "agent: ready").then_some(Ok(String::new())))?;
        Ok(guest)
    }

    /// Revives a checkpoint.
    pub(super) fn revive(
        files: &GuestFiles,
        dir: &Path,
        image: &Path,
        tag: &str,
    ) -> Result<Self, Error> {
        Self::start(files, dir, image, &["--loadvm", tag])
    }

    fn start(files: &GuestFiles, dir: &Path, image: &Path, more: &[&str]) -> Result<Self, Error> {
        let failed = |error: std::io::Error| DemoError::Program {
            program: "tardigrade",
            reason: error.to_string(),
        };
        let (qmp, serial, log) = (dir.join("qmp"), dir.join("serial"), dir.join("log"));
        let stderr = std::fs::File::create(&log).map_err(failed)?;
        let started = Instant::now();
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["-m", "128M", "--smp", "2", "--append", CMDLINE, "--kernel"])
            .arg(&files.kernel)
            .arg("--initrd")
            .arg(&files.initrd)
            .arg("--blockdev")
            .arg(format!(
                "driver=qcow2,node-name={DISK},file.driver=file,file.filename={}",
                image.display()
            ))
            .args(["--device", &format!("virtio-blk-device,drive={DISK}")])
            .args(["--qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["--serial", &format!("unix:{},server=on,wait=on", serial.display())])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(failed)?;
        let stream = connect(&serial, &mut child, &log)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let serial = BufReader::new(stream);
        Ok(Self { child, started, serial, qmp_path: qmp, log, questions: 0 })
    }

    /// A QMP session.
    pub(super) fn qmp(&self) -> Result<Client, Error> {
        Ok(Client::connect(&self.qmp_path)?)
    }

    pub(super) fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// Asks the agent; gives what follows the `ok`.
    pub(super) fn ask(&mut self, request: &str) -> Result<String, Error> {
        self.questions += 1;
        // The agent of a revived guest has not heard of earlier processes' questions.
        let token = format!("d{}.{}", self.child.id(), self.questions);
        let sent = self.serial.get_mut().write_all(format!("{token} {request}\n").as_bytes());
        sent.map_err(|error| self.failure(&format!("the guest cannot be asked: {error}")))?;
        self.wait_line(|line| {
            let answer = line.strip_prefix(&token)?.trim_start();
            let ok = answer.strip_prefix("ok").map(|fields| Ok(fields.trim_start().to_owned()));
            ok.or_else(|| answer.strip_prefix("error").map(|text| Err(text.trim().to_owned())))
        })
    }

    fn wait_line(
        &mut self,
        wanted: impl Fn(&str) -> Option<Result<String, String>>,
    ) -> Result<String, Error> {
        loop {
            let mut line = Vec::new();
            match self.serial.read_until(b'\n', &mut line) {
                Ok(0) => return Err(self.failure("the guest is gone")),
                Ok(_) => {}
                Err(error) => return Err(self.failure(&format!("the guest is silent: {error}"))),
            }
            if let Some(answer) = wanted(String::from_utf8_lossy(&line).trim_end()) {
                return answer.map_err(|text| self.failure(&format!("the guest says: {text}")));
            }
        }
    }

    /// Kills the process, as a power cut would.
    pub(super) fn kill(mut self) -> Result<(), Error> {
        let ended = self.child.kill().and_then(|()| self.child.wait());
        ended.map(|_| ()).map_err(|error| self.failure(&error.to_string()))
    }

    /// Waits until the machine has ended by itself.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        match self.child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(self.failure(&format!("the machine ended with {status}"))),
            Err(error) => Err(self.failure(&error.to_string())),
        }
    }

    /// Starts a shell on the serial port, for which the caller gets the connection and the bytes
    /// with which the agent's answer begins when the shell has ended.
    pub(super) fn open_shell(&mut self) -> Result<(UnixStream, Vec<u8>), Error> {
        let token = format!("shell-{}", self.child.id());
        let send = |stream: &mut UnixStream| {
            stream.write_all(format!("{token} shell\n").as_bytes())?;
            stream.set_read_timeout(None)?;
            stream.try_clone()
        };
        let stream = send(self.serial.get_mut());
        let stream = stream.map_err(|error| self.failure(&error.to_string()))?;
        Ok((stream, format!("{token} ").into_bytes()))
    }

    fn failure(&self, what: &str) -> Error {
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        DemoError::Guest(what.to_owned(), said.trim().to_owned()).into()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The serial socket is there as soon as the process has looked at its command line.
fn connect(path: &Path, child: &mut Child, log: &Path) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        let ended = child.try_wait().ok().flatten().is_some();
        if ended || Instant::now() > deadline {
            let said = std::fs::read_to_string(log).unwrap_or_default();
            let what = "the machine did not start".to_owned();
            return Err(DemoError::Guest(what, said.trim().to_owned()).into());
        }
        // There is nothing to wait for: the socket's file is made by the other process.
        std::thread::sleep(Duration::from_millis(5));
    }
}
