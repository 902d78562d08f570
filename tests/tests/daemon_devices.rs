//! An image made in a block device by QMP: blockdev-create into a host_device node.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tardigrade_tests::daemon::{Daemon, have_qemu};

/// A loop device over a file, which is given up at the end.
struct Loop(String);

impl Loop {
    /// None, with a word of why, where the host gives none.
    fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["-f", "--show"]).arg(file).output();
        let Some(made) = made.ok().filter(|made| made.status.success()) else {
            eprintln!("SKIPPED: no loop device (root, and losetup, are needed)");
            return None;
        };
        Some(Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}{error}");
}

/// Makes an image in node "hd"; gives the job's error.
fn create(daemon: &mut Daemon, options: &Value) -> Option<String> {
    let mut all = json!({"driver": "qcow2", "file": "hd"});
    all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    daemon.qmp("blockdev-create", json!({"job-id": "make", "options": all}));
    let job = loop {
        let jobs = daemon.qmp("query-jobs", json!({}));
        let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == "make").unwrap().clone();
        if job["status"] == "concluded" {
            break job;
        }
        std::thread::yield_now();
    };
    daemon.qmp("job-dismiss", json!({"id": "make"}));
    job.get("error").map(|error| error.as_str().unwrap().to_owned())
}

#[test]
fn blockdev_create_into_a_host_device_makes_an_image_that_qemu_takes() {
    if !have_qemu("devices") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("device");
    // What was there before must not show.
    std::fs::write(&file, vec![7; 8 << 20]).unwrap();
    let Some(device) = Loop::over(&file) else { return };
    let socket = dir.path().join("nbd").display().to_string();
    let mut daemon = Daemon::start(&[]);
    let inline =
        |name: &str| json!({"size": 4 << 20, "file": {"driver": "host_device", "filename": name}});
    assert_eq!(create(&mut daemon, &inline(&device.0)), None);
    run("qemu-img", &["check", "-f", "qcow2", &device.0]);
    let error = create(&mut daemon, &inline(file.to_str().unwrap())).expect("no device");
    assert!(error.contains("to be either a character or block device"), "{error}");
    daemon.qmp(
        "blockdev-add",
        json!({"driver": "host_device", "node-name": "hd", "filename": device.0}),
    );
    let full = json!({"size": 64 << 20, "preallocation": "full"});
    let error = create(&mut daemon, &full).expect("an image larger than the device");
    assert!(error.contains("the new image needs"), "{error}");
    assert_eq!(create(&mut daemon, &json!({"size": 4 << 20, "preallocation": "metadata"})), None);
    // Once more, over what the first has left.
    assert_eq!(create(&mut daemon, &json!({"size": 64 << 20})), None);
    daemon.qmp("blockdev-add", json!({"driver": "qcow2", "node-name": "d", "file": "hd"}));
    daemon.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    daemon.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "d", "writable": true}),
    );
    let url = format!("nbd+unix:///d?socket={socket}");
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 1M", "-c", "read -P 0 0 1M", &url]);
    assert!(daemon.quit().success());
    run("qemu-img", &["check", "-f", "qcow2", &device.0]);
    let reads = ["-c", "read -P 9 1M 1M", "-c", "read -P 0 2M 62M", "-c", "read -P 0 0 1M"];
    run("qemu-io", &[&["-f", "qcow2"][..], &reads, &[device.0.as_str()]].concat());
}
