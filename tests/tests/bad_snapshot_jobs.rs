//! Snapshot jobs with arguments that cannot be: each is refused with QEMU's words before the guest
//! is stopped, and the machine works afterwards as if nothing had been asked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use qmp::client::ClientError;
use serde_json::{Value, json};
use tardigrade_tests::counter::{self, Running, snapshot};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::require;

/// disk0 and disk1 can have snapshots; disk2 is raw; disk3 is qcow2 and read-only.
fn disks(dir: &Path) -> [Disk; 4] {
    let path = |name: &str| dir.join(name);
    [
        Disk::qcow2(path("disk0.qcow2"), "16M"),
        Disk::qcow2(path("disk1.qcow2"), "32M"),
        Disk::create(path("disk2.raw"), "raw", &[], "16M"),
        Disk::qcow2(path("disk3.qcow2"), "16M"),
    ]
}

fn start(dir: &Path, disks: &[Disk; 4]) -> Running {
    let [disk0, disk1, raw, read_only] = disks;
    let spec = counter::spec(dir, 1 << 20).disk(disk0).disk(disk1).disk(raw);
    Running::start(&spec.disk_with(read_only, ",read-only=on", ""))
}

#[test]
fn every_refused_job_says_why_and_leaves_guest_and_images_alone() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = disks(dir.path());
    // On one of the disks only, made by QEMU, without VM state.
    qemu_img(&["snapshot", "-c", "half", &disks[1].file()]);
    qemu_img(&["snapshot", "-c", "alone", &disks[0].file()]);
    qemu_img(&["snapshot", "-c", "alone", &disks[1].file()]);
    let mut vm = start(dir.path(), &disks);
    vm.done("snapshot-save", snapshot("good", &["disk0", "disk1"]));
    let saved = vm.count();
    vm.check_alive();

    let both = ["disk0", "disk1"];
    let with_vmstate = |tag: &str, vmstate: &str, devices: &[&str]| -> Value {
        json!({ "tag": tag, "vmstate": vmstate, "devices": devices })
    };
    let exists = |tag: &str| format!("Snapshot '{tag}' already exists in one or more devices");
    let lacks = |tag: &str| format!("Snapshot '{tag}' does not exist in one or more devices");
    let unfit = |node: &str| format!("Device '{node}' is writable but does not support snapshots");
    let no_node = "No block device node 'nowhere'".to_owned();
    let twice = "Block device node 'disk0' is listed more than once".to_owned();
    let none = "At least one device is required for snapshot".to_owned();
    let not_there = |node: &str| format!("vmstate block device '{node}' does not exist");
    let disk_only = "This is a disk-only snapshot. Revert to it  offline using qemu-img".to_owned();

    let both_commands = [
        (with_vmstate("t", "disk0", &[]), none.clone()),
        (with_vmstate("t", "nowhere", &["nowhere"]), no_node.clone()),
        (with_vmstate("t", "disk0", &["disk0", "nowhere"]), no_node.clone()),
        (with_vmstate("t", "disk0", &["disk0", "disk1", "disk0"]), twice.clone()),
        (with_vmstate("t", "disk2", &["disk0", "disk2"]), unfit("disk2")),
        (with_vmstate("t", "disk0", &["disk0", "disk3"]), unfit("disk3")),
        // A QEMU device id or path is no node's name, and neither is a tag or nothing.
        (
            with_vmstate("t", "disk0", &["/machine/peripheral-anon/device[0]", "disk0"]),
            "No block device node '/machine/peripheral-anon/device[0]'".to_owned(),
        ),
        (with_vmstate("t", "disk0", &["disk0", ""]), "No block device node ''".to_owned()),
    ];
    for (arguments, text) in both_commands {
        for command in ["snapshot-save", "snapshot-load"] {
            let error = vm.refused(command, arguments.clone());
            assert!(error.starts_with(&text), "{command} {arguments}: {error}");
        }
    }
    let saves = [
        (snapshot("good", &both), exists("good")),
        (snapshot("good", &["disk1"]), exists("good")),
        (snapshot("half", &both), exists("half")),
        (with_vmstate("t", "disk1", &["disk0"]), not_there("disk1")),
        (with_vmstate("t", "nowhere", &["disk0"]), not_there("nowhere")),
        (with_vmstate("t", "", &["disk0"]), not_there("")),
        (snapshot("a\0b", &both), "Snapshot tag 'a\\0b' contains a NUL character".to_owned()),
    ];
    for (arguments, text) in saves {
        let error = vm.refused("snapshot-save", arguments.clone());
        assert!(error.starts_with(&text), "save {arguments}: {error}");
    }
    let loads = [
        (snapshot("nope", &both), lacks("nope")),
        (snapshot("half", &both), lacks("half")),
        (snapshot("", &both), lacks("")),
        // The id of a snapshot is no tag.
        (snapshot("1", &both), lacks("1")),
        (with_vmstate("good", "disk1", &["disk0"]), not_there("disk1")),
        (snapshot("alone", &both), disk_only.clone()),
        // The VM state is on the other node.
        (snapshot("good", &["disk1", "disk0"]), disk_only),
    ];
    for (arguments, text) in loads {
        let error = vm.refused("snapshot-load", arguments.clone());
        assert!(error.starts_with(&text), "load {arguments}: {error}");
    }
    let half = vm.refused("snapshot-save", snapshot("half", &both));
    assert!(half.contains("'disk1'") && !half.contains("'disk0'"), "which disk? {half}");
    let deletes = [
        (json!([]), none),
        (json!(["disk0", "nowhere"]), no_node),
        (json!(["disk0", "disk0"]), twice),
        (json!(["disk0", "disk2"]), unfit("disk2")),
        (json!(["disk3"]), unfit("disk3")),
    ];
    for (devices, text) in deletes {
        let error = vm.refused("snapshot-delete", json!({ "tag": "good", "devices": devices }));
        assert!(error.starts_with(&text), "delete {devices}: {error}");
    }
    // As in QEMU, a tag that is nowhere is no error, and nothing is deleted.
    vm.done("snapshot-delete", json!({ "tag": "nope", "devices": both }));
    vm.check_alive();

    // All that was there is there, and works.
    vm.done("snapshot-load", snapshot("good", &both));
    vm.expect_count(saved);
    vm.done("snapshot-delete", json!({ "tag": "half", "devices": both }));
    vm.done("snapshot-save", snapshot("half", &both));
    vm.check_alive();
    vm.vm.quit();
    assert_eq!(disks[0].tags(), ["alone", "good", "half"]);
    assert_eq!(disks[1].tags(), ["alone", "good", "half"]);
    assert!(disks[3].tags().is_empty());
    for disk in [&disks[0], &disks[1], &disks[3]] {
        disk.check();
    }
}

#[test]
fn wrong_arguments_are_errors_of_the_command_and_make_no_job() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = disks(dir.path());
    let mut vm = start(dir.path(), &disks);
    vm.qmp
        .execute(
            "snapshot-save",
            json!({
        "job-id": "kept", "tag": "good", "vmstate": "disk0", "devices": ["disk0"] }),
        )
        .unwrap();
    let concluded = |event: &Value| event["data"]["status"] == "concluded";
    vm.qmp.wait_event(std::time::Duration::from_secs(60), concluded).unwrap();
    vm.check_alive();
    vm.qmp.take_events();

    let full =
        |id: &str| json!({ "job-id": id, "tag": "t", "vmstate": "disk0", "devices": ["disk0"] });
    let without = |member: &str| {
        let mut arguments = full("new");
        arguments.as_object_mut().unwrap().remove(member);
        arguments
    };
    let with = |member: &str, value: Value| {
        let mut arguments = full("new");
        arguments[member] = value;
        arguments
    };
    let cases = [
        (full("kept"), "Job ID 'kept' already in use"),
        (full(""), "Invalid job ID ''"),
        (full("1a"), "Invalid job ID '1a'"),
        (full("a b"), "Invalid job ID 'a b'"),
        (without("job-id"), "Parameter 'job-id' is missing"),
        (without("tag"), "Parameter 'tag' is missing"),
        (without("vmstate"), "Parameter 'vmstate' is missing"),
        (without("devices"), "Parameter 'devices' is missing"),
        (with("tag", json!(1)), "Invalid parameter type for 'tag', expected: string"),
        (with("devices", json!("disk0")), "Invalid parameter type for 'devices', expected: array"),
        (with("devices", json!([1])), "Invalid parameter type for 'devices[0]', expected: string"),
        (with("force", json!(true)), "Parameter 'force' is unexpected"),
    ];
    for (arguments, text) in cases {
        for command in ["snapshot-save", "snapshot-load"] {
            match vm.qmp.execute(command, arguments.clone()) {
                Err(ClientError::Command(error)) => assert_eq!(error.desc, text, "{arguments}"),
                other => panic!("{command} {arguments}: {other:?}"),
            }
        }
    }
    let unknown = [("job-dismiss", "nope"), ("job-cancel", "nope")];
    for (command, id) in unknown {
        match vm.qmp.execute(command, json!({ "id": id })) {
            Err(ClientError::Command(error)) => assert_eq!(error.desc, "Job not found"),
            other => panic!("{command}: {other:?}"),
        }
    }
    assert!(vm.qmp.take_events().is_empty());
    let jobs = vm.qmp.execute("query-jobs", json!({})).unwrap();
    assert_eq!(jobs.as_array().unwrap().len(), 1, "{jobs}");
    vm.check_alive();
    vm.vm.quit();
    disks[0].check();
    assert_eq!(disks[0].tags(), ["good"]);
}
