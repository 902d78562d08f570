//! The two storage daemons, started with the same options.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::images::Image;
use crate::program::{PATIENCE, tardigrade};
use crate::report::Report;

use super::client::Client;
use super::{OURS, QSD};

const EXPORT: &str = "disk";

/// A program that exports images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Daemon {
    Tardigrade,
    Qemu,
}

/// Tardigrade, and QEMU's daemon where it is installed.
pub(crate) fn installed(report: &mut Report) -> Vec<Daemon> {
    match Command::new("qemu-storage-daemon").arg("--version").output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            report.note(text.lines().next().unwrap_or_default());
            vec![Daemon::Tardigrade, Daemon::Qemu]
        }
        Err(_) => {
            report.note(
                "qemu-storage-daemon is not here, so NBD is compared with nothing: apt-get \
                 install qemu-system-common",
            );
            vec![Daemon::Tardigrade]
        }
    }
}

/// A daemon with an image; killed when dropped.
pub(crate) struct Running {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tardigrade => OURS,
            Self::Qemu => QSD,
        }
    }

    /// Starts it with the image as a writable export.
    pub(crate) fn start(self, image: &Image) -> Running {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd");
        let mut command = match self {
            Self::Tardigrade => {
                let mut command = Command::new(tardigrade());
                command.args(["--machine", "none"]);
                command
            }
            Self::Qemu => Command::new("qemu-storage-daemon"),
        };
        let child = command
            .args(["--blockdev", &blockdev(image)])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", &format!("type=nbd,id=e,node-name={EXPORT},writable=on")])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Running { child, socket, _dir: dir }
    }
}

fn blockdev(image: &Image) -> String {
    let file = |prefix: &str, path: &Path| {
        format!(
            "{prefix}file.driver=file,{prefix}file.filename={},{prefix}file.aio=io_uring",
            path.display()
        )
    };
    let mut text = format!("driver=qcow2,node-name={EXPORT},{}", file("", &image.path));
    if let Some(backing) = &image.backing {
        text += &format!(",backing.driver=qcow2,{}", file("backing.", backing));
    }
    text
}

impl Running {
    /// A client of the export, once the daemon is ready.
    pub(crate) fn connect(&self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(client) = Client::connect(&self.socket, EXPORT) {
                return client;
            }
            assert!(Instant::now() < deadline, "the daemon does not start");
            // Nothing tells of the socket; this is before the clock runs.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Ends the daemon by a signal, which it takes as a wish to close its images.
    pub(crate) fn stop(mut self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: the process is a child that was not waited for, so the number is its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        self.child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
