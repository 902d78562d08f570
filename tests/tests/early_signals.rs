//! Signals that come before a machine or daemon is whole: it ends by them, and leaves no file behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tardigrade_tests::baremetal::machine;
use tardigrade_tests::process::{Awaited, Watch, wait_for_end};
use tardigrade_tests::require;
use tardigrade_tests::vm::binary;

const PATIENCE: Duration = Duration::from_secs(120);

/// Starts with these arguments and sends the signal as soon as the file is there.
fn end_early(dir: &Path, args: &[String], file: &str, signal: i32) {
    let mut watch = Watch::new(dir);
    let mut child = Command::new(binary())
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(watch.wait(&dir.join(file), &child, PATIENCE), Awaited::File);
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: the child has not been waited for, so the process id is its own.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    assert!(wait_for_end(&child, PATIENCE), "it does not end");
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(signal), "{status}");
}

fn files(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(name).collect();
    files.sort();
    files
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn a_daemon_that_waits_for_its_first_client_ends_by_a_signal_without_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let args = words(
        "--machine none --pidfile pid --nbd-server addr.type=unix,addr.path=nbd \
         --qmp unix:other,server=on,wait=off --qmp unix:qmp,server=on,wait=on",
    );
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        end_early(dir.path(), &args, "qmp", signal);
        assert_eq!(files(dir.path()), [""; 0]);
    }
}

#[test]
fn a_machine_whose_console_is_waited_for_ends_by_a_signal_and_leaves_alone_what_is_not_its_own() {
    if !require::kvm() {
        return;
    }
    let (dir, kernel) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Somebody else's.
    let _listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
    let mut args = machine(kernel.path(), "32M", 1).arguments().to_vec();
    args.extend(words(
        "--pidfile pid --qmp unix:qmp,server=on,wait=off --serial unix:serial,server=on,wait=on",
    ));
    end_early(dir.path(), &args, "serial", libc::SIGTERM);
    assert_eq!(files(dir.path()), ["qmp"]);
}
