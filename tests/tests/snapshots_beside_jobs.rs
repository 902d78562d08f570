//! Snapshots and block jobs that must not come in each other's way: what a stream takes away an internal
//! snapshot would still read, and a disk that goes back to a snapshot is not what a job copies.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::counter;
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);

fn gone(vm: &Vm, id: &str, ask: impl FnOnce(&mut Client)) {
    let mut qmp = vm.qmp();
    ask(&mut qmp);
    let over = |event: &Value| event["data"]["id"] == id && event["data"]["status"] == "null";
    qmp.wait_event(PATIENCE, over).unwrap();
}

fn busy(error: &str, with: &str) {
    let words = format!("is busy: block device is in use by block job: {with}");
    assert!(error.contains(&words), "{error}");
}

#[test]
fn nobody_snapshots_or_reverts_a_disk_that_is_streamed_or_committed() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let data = vec![7_u8; 2 << 20];
    std::fs::write(dir.path().join("data"), data).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &path("data"), &path("base.qcow2")]);
    let base = ["-b", &path("base.qcow2"), "-F", "qcow2"];
    qemu_img(&[&["create", "-q", "-f", "qcow2"], &base[..], &[&path("top.qcow2")]].concat());
    let kernel = dir.path().join("counter.elf");
    std::fs::write(&kernel, counter::kernel(0)).unwrap();
    let top = Disk { path: dir.path().join("top.qcow2"), format: "qcow2" };
    let mut vm = VmSpec::new("64M", 1).args(&["--kernel", &path("counter.elf")]).disk(&top).start();

    // It would take half a minute.
    let stream = json!({ "job-id": "s", "device": "disk0", "speed": 1 << 16 });
    vm.qmp().execute("block-stream", stream).unwrap();
    busy(&vm.job("snapshot-save", "t", &["disk0"]).unwrap_err(), "stream");
    assert!(vm.job("snapshot-load", "t", &["disk0"]).is_err());
    let mut qmp = vm.qmp();
    let name = json!({ "device": "disk0", "name": "n" });
    for command in ["blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"] {
        let error = qmp.execute(command, name.clone()).unwrap_err().to_string();
        assert!(error.contains("Need a root block node"), "{error}");
    }
    assert_eq!(vm.status(), "running");
    gone(&vm, "s", |qmp| {
        qmp.execute("block-job-set-speed", json!({ "device": "s", "speed": 0 })).unwrap();
    });
    vm.save("t", &["disk0"]);
    vm.load("t", &["disk0"]);

    // The uppermost image of two is committed, and waits to be told to take its base's place.
    let overlay = json!({ "node-name": "disk0", "snapshot-file": path("over.qcow2"),
        "snapshot-node-name": "over" });
    qmp.execute("blockdev-snapshot-sync", overlay).unwrap();
    vm.save("u", &["over"]);
    // Back to the last one, with nothing written since, no disk has to go: a job may copy it meanwhile.
    vm.save("v", &["over"]);
    let mut jobs = vm.qmp();
    jobs.execute("block-commit", json!({ "job-id": "c", "device": "over" })).unwrap();
    jobs.wait_event(PATIENCE, |event| event["event"] == "BLOCK_JOB_READY").unwrap();
    busy(&vm.job("snapshot-load", "u", &["over"]).unwrap_err(), "commit");
    assert_eq!(vm.status(), "running");
    gone(&vm, "c", |qmp| {
        qmp.execute("job-cancel", json!({ "id": "c" })).unwrap();
    });
    vm.load("u", &["over"]);
    vm.quit();
    for name in ["top.qcow2", "over.qcow2"] {
        Disk { path: dir.path().join(name), format: "qcow2" }.check();
    }
}

/// Has `to` become the same as `from`; it is ready.
fn mirror(qmp: &mut Client, id: &str, from: &str, to: &str) {
    let arguments = json!({ "job-id": id, "device": from, "target": to, "sync": "full" });
    qmp.execute("blockdev-mirror", arguments).unwrap();
    let ready =
        |event: &Value| event["event"] == "BLOCK_JOB_READY" && event["data"]["device"] == id;
    qmp.wait_event(PATIENCE, ready).unwrap();
}

fn complete(vm: &Vm, id: &str) {
    gone(vm, id, |qmp| {
        qmp.execute("job-complete", json!({ "id": id })).unwrap();
    });
}

/// A guest whose disk is mirrored by the job `m`, ready for the pivot, while the save `s` is paused.
struct Mirrored {
    dir: TempDir,
    disk: Disk,
    target: Disk,
    vm: Vm,
    qmp: Client,
}

impl Mirrored {
    fn with_a_paused_save() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
        let target = Disk::qcow2(dir.path().join("target.qcow2"), "16M");
        let kernel = dir.path().join("counter.elf");
        // A save that takes a while.
        std::fs::write(&kernel, counter::kernel(128 << 20)).unwrap();
        let kernel = kernel.display().to_string();
        let vm = VmSpec::new("256M", 1).args(&["--kernel", &kernel]).disk(&disk).start();
        let mut qmp = vm.qmp();
        let node = json!({ "driver": "qcow2", "node-name": "target",
            "file": { "driver": "file", "filename": target.path } });
        qmp.execute("blockdev-add", node).unwrap();
        mirror(&mut qmp, "m", "disk0", "target");
        let save = json!({ "job-id": "s", "tag": "t", "vmstate": "disk0", "devices": ["disk0"] });
        qmp.execute("snapshot-save", save).unwrap();
        qmp.execute("job-pause", json!({ "id": "s" })).unwrap();
        let paused =
            |event: &Value| event["data"]["id"] == "s" && event["data"]["status"] == "paused";
        qmp.wait_event(PATIENCE, paused).unwrap();
        Self { dir, disk, target, vm, qmp }
    }
}

#[test]
fn a_disk_whose_place_another_took_is_neither_saved_nor_gone_back_to_as_the_guests() {
    if !require::kvm() {
        return;
    }
    let Mirrored { dir: _dir, disk, target, mut vm, mut qmp } = Mirrored::with_a_paused_save();
    complete(&vm, "m");
    qmp.execute("job-resume", json!({ "id": "s" })).unwrap();
    let over = |event: &Value| event["data"]["id"] == "s" && event["data"]["status"] == "concluded";
    qmp.wait_event(PATIENCE, over).unwrap();
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    let error = jobs[0]["error"].as_str().unwrap();
    assert!(error.contains("were 'disk0' when the job began and are 'target' now"), "{error}");
    qmp.execute("job-dismiss", json!({ "id": "s" })).unwrap();

    vm.save("t", &["target"]);
    // From here on it would be gone back to by the short way.
    vm.load("t", &["target"]);
    mirror(&mut qmp, "n", "target", "disk0");
    complete(&vm, "n");
    let error = vm.job("snapshot-load", "t", &["target"]).unwrap_err();
    assert!(error.contains("'disk0'") && error.contains("'target'"), "{error}");
    assert_eq!(vm.status(), "running");
    vm.save("u", &["disk0"]);
    vm.load("u", &["disk0"]);
    vm.quit();
    disk.check();
    target.check();
}

/// A line of the monitor that was sent and read, and is not answered yet.
struct Sent(BufReader<UnixStream>);

impl Sent {
    fn new(vm: &Vm, line: &str) -> Self {
        let mut sent = Self(BufReader::new(UnixStream::connect(vm.qmp_path()).unwrap()));
        let enable = json!({ "execute": "qmp_capabilities", "arguments": { "enable": ["oob"] } });
        let line = json!({ "execute": "human-monitor-command", "id": "line",
            "arguments": { "command-line": line } });
        // Answered once what came before it was handed on.
        let after = json!({ "exec-oob": "query-jobs", "id": "after" });
        for message in [enable, line, after] {
            sent.0.get_mut().write_all(message.to_string().as_bytes()).unwrap();
        }
        sent.answer("after");
        sent
    }

    fn answer(&mut self, id: &str) -> Value {
        loop {
            let mut text = String::new();
            assert!(self.0.read_line(&mut text).unwrap() > 0, "the connection has ended");
            let message: Value = serde_json::from_str(&text).unwrap();
            if message["id"] == id {
                return message["return"].clone();
            }
            assert_ne!(message["id"], "line", "{text}");
        }
    }
}

#[test]
fn savevm_behind_a_job_saves_the_disk_that_the_guest_has_when_its_turn_comes() {
    if !require::kvm() {
        return;
    }
    let Mirrored { dir: _dir, disk, target, mut vm, mut qmp } = Mirrored::with_a_paused_save();
    let mut sent = Sent::new(&vm, "savevm u");
    complete(&vm, "m");
    qmp.execute("job-cancel", json!({ "id": "s" })).unwrap();
    assert_eq!(sent.answer("line"), "");
    let tags = |disk: &Disk| qemu_img(&["snapshot", "-U", "-l", &disk.path.display().to_string()]);
    assert!(tags(&target).contains(" u "), "{}", tags(&target));
    assert!(!tags(&disk).contains(" u "), "{}", tags(&disk));
    // And it is there to go back to.
    vm.load("u", &["target"]);
    vm.quit();
    disk.check();
    target.check();
}
