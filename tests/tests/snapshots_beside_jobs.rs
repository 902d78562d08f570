//! Snapshots and block jobs that must not come in each other's way: what a stream takes away an internal
//! snapshot would still read, and a disk that goes back to a snapshot is not what a job copies.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use std::time::Duration;

use serde_json::{Value, json};
use tardigrade_tests::counter;
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec};

const PATIENCE: Duration = Duration::from_secs(120);

fn gone(vm: &Vm, id: &str, ask: impl FnOnce(&mut qmp::client::Client)) {
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
    busy(
        &qmp.execute("blockdev-snapshot-internal-sync", name.clone()).unwrap_err().to_string(),
        "stream",
    );
    let deleted = qmp.execute("blockdev-snapshot-delete-internal-sync", name);
    busy(&deleted.unwrap_err().to_string(), "stream");
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
