//! Block jobs on disks that a guest writes to all the time: the guest itself looks whether each block has what
//! it wrote there, and the images are right and without a fault after them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use serde_json::{Value, json};
use tardigrade_tests::busy::{Busy, SLOW, check_image, check_whole};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::require;

#[allow(clippy::needless_pass_by_value, reason = "callers build it in place")]
fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

/// A backup of disk `n` and an internal snapshot of the same moment.
fn backup_and_snapshot(n: usize) -> [Value; 2] {
    let (disk, copy) = (format!("disk{n}"), format!("copy{n}"));
    let backup = json!({
        "job-id": format!("b{n}"), "device": disk, "target": copy, "sync": "full", "speed": SLOW,
    });
    [
        action("blockdev-snapshot-internal-sync", json!({"device": disk, "name": "moment"})),
        action("blockdev-backup", backup),
    ]
}

/// The copy is the disk at the moment of its snapshot, byte for byte; both images are without a fault.
fn check_copy(disk: &Disk, copy: &Disk, contents: &[u8]) {
    check_image(disk, contents);
    copy.check();
    let moment = disk.read(Some("moment"));
    assert!(copy.read(None) == moment, "the copy is not of the moment");
    assert!(!moment.starts_with(contents), "the guest wrote nothing after the moment");
}

#[test]
fn a_backup_is_the_disk_at_its_start_byte_for_byte() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let copy = busy.add_image("copy0");
    let actions = backup_and_snapshot(0);
    busy.run("transaction", json!({"actions": actions}));
    busy.hurry("b0");
    busy.wait_completed("b0");
    busy.check();
    let contents = busy.finish();
    let disk = Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" };
    check_copy(&disk, &copy, &contents[0]);
}

#[test]
fn a_backup_that_begins_while_the_guest_stands_is_what_it_stood_on() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let copy = busy.add_image("copy");
    busy.run("stop", json!({}));
    let snapshot = json!({"device": "disk0", "name": "moment"});
    busy.run("blockdev-snapshot-internal-sync", snapshot);
    let backup = json!({
        "job-id": "b", "device": "disk0", "target": "copy", "sync": "full", "speed": SLOW,
    });
    busy.run("blockdev-backup", backup);
    busy.run("cont", json!({}));
    busy.hurry("b");
    busy.wait_completed("b");
    let contents = busy.finish();
    let disk = Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" };
    check_copy(&disk, &copy, &contents[0]);
}

#[test]
fn backups_of_two_disks_in_a_transaction_are_of_its_moment() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 2);
    let copies = [busy.add_image("copy0"), busy.add_image("copy1")];
    let [[s0, b0], [s1, b1]] = [backup_and_snapshot(0), backup_and_snapshot(1)];
    busy.run("transaction", json!({"actions": [s0, s1, b0, b1]}));
    busy.hurry("b0");
    busy.hurry("b1");
    busy.wait_completed("b0");
    busy.wait_completed("b1");
    let contents = busy.finish();
    for (n, copy) in copies.iter().enumerate() {
        let disk = Disk { path: dir.path().join(format!("disk{n}.qcow2")), format: "qcow2" };
        check_copy(&disk, copy, &contents[n]);
    }
}

#[test]
fn grouped_backups_of_two_disks_end_together_and_one_that_is_cancelled_ends_both() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 2);
    let copies = [busy.add_image("copy0"), busy.add_image("copy1")];
    let backup = |n: usize| backup_and_snapshot(n)[1].clone();
    let grouped = json!({
        "actions": [backup(0), backup(1)], "properties": {"completion-mode": "grouped"},
    });
    busy.run("transaction", grouped.clone());
    busy.hurry("b0");
    busy.wait_status("b0", "waiting");
    busy.run("job-cancel", json!({"id": "b1"}));
    for id in ["b0", "b1"] {
        busy.wait_job_event("BLOCK_JOB_CANCELLED", id);
        busy.wait_status(id, "null");
    }
    busy.check();
    busy.run("transaction", grouped);
    busy.hurry("b1");
    busy.wait_status("b1", "waiting");
    busy.hurry("b0");
    for id in ["b0", "b1"] {
        busy.wait_completed(id);
    }
    let contents = busy.finish();
    for (n, copy) in copies.iter().enumerate() {
        let disk = Disk { path: dir.path().join(format!("disk{n}.qcow2")), format: "qcow2" };
        check_image(&disk, &contents[n]);
        check_whole(copy);
    }
}

/// A mirror to which the guest goes over while it writes.
fn pivot(copy_mode: &str) {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let target = busy.add_image("target");
    let mirror = json!({
        "job-id": "m", "device": "disk0", "target": "target", "sync": "full",
        "copy-mode": copy_mode, "speed": SLOW,
    });
    busy.run("blockdev-mirror", mirror);
    busy.hurry("m");
    busy.wait_job_event("BLOCK_JOB_READY", "m");
    busy.check();
    assert_eq!(busy.used_nodes(), ["disk0"]);
    busy.run("job-complete", json!({"id": "m"}));
    busy.wait_completed("m");
    assert_eq!(busy.used_nodes(), ["target"]);
    // Nobody uses the old one any more.
    busy.run("blockdev-del", json!({"node-name": "disk0"}));
    let contents = busy.finish();
    check_image(&target, &contents[0]);
    let old = Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" };
    old.check();
    assert!(!old.read(None).starts_with(&contents[0]), "the guest wrote to the old disk");
}

#[test]
fn a_guest_that_writes_goes_over_to_a_mirror_that_copies_behind_it() {
    pivot("background");
}

#[test]
fn a_guest_that_writes_goes_over_to_a_mirror_that_has_each_write_at_once() {
    pivot("write-blocking");
}

#[test]
fn a_mirror_that_is_left_is_the_disk_at_its_end() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let target = busy.add_image("target");
    let mirror = json!({"job-id": "m", "device": "disk0", "target": "target", "sync": "full"});
    busy.run("blockdev-mirror", mirror);
    busy.wait_job_event("BLOCK_JOB_READY", "m");
    busy.goes_on();
    // The guest stands while it ends, so that what it has is known.
    busy.stop_writing();
    let at_the_end = busy.contents().remove(0);
    busy.run("block-job-cancel", json!({"device": "m"}));
    busy.wait_completed("m");
    assert_eq!(busy.used_nodes(), ["disk0"]);
    busy.vm.quit();
    check_image(&target, &at_the_end);
    let disk = Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" };
    check_image(&disk, &at_the_end);
}

/// disk0 <- s1 <- s2 <- s3, each with writes of the guest, which is at s3 now.
fn chain(busy: &mut Busy, dir: &std::path::Path) -> [Disk; 4] {
    let base = Disk { path: dir.join("disk0.qcow2"), format: "qcow2" };
    [
        base,
        busy.add_overlay("disk0", "s1"),
        busy.add_overlay("s1", "s2"),
        busy.add_overlay("s2", "s3"),
    ]
}

/// What an image names as the one below it.
fn backing(disk: &Disk) -> Option<String> {
    disk.info()["backing-filename"].as_str().map(str::to_owned)
}

#[test]
fn a_commit_of_the_image_that_is_written_to_has_the_guest_on_the_base() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let [base, .., top] = chain(&mut busy, dir.path());
    busy.run("block-commit", json!({"job-id": "c", "device": "s3", "speed": SLOW}));
    busy.hurry("c");
    busy.wait_job_event("BLOCK_JOB_READY", "c");
    busy.check();
    assert_eq!(busy.used_nodes(), ["s3"]);
    busy.run("job-complete", json!({"id": "c"}));
    busy.wait_completed("c");
    assert_eq!(busy.used_nodes(), ["disk0"]);
    assert!(["s3", "s2", "s1"].iter().all(|node| !busy.has_node(node)), "nobody uses them");
    let contents = busy.finish();
    check_image(&base, &contents[0]);
    assert_eq!(backing(&base), None);
    top.check();
}

#[test]
fn a_commit_of_a_middle_image_leaves_the_chain_without_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let [base, s1, s2, top] = chain(&mut busy, dir.path());
    let commit = json!({
        "job-id": "c", "device": "s3", "top-node": "s2", "base-node": "s1", "speed": SLOW,
    });
    busy.run("block-commit", commit);
    busy.hurry("c");
    busy.wait_completed("c");
    busy.check();
    assert_eq!(busy.used_nodes(), ["s3"]);
    assert!(busy.has_node("s1") && !busy.has_node("s2"));
    let contents = busy.finish();
    check_image(&top, &contents[0]);
    assert_eq!(backing(&top), Some(s1.file()));
    assert_eq!(backing(&s1), Some(base.file()));
    [base, s1, s2].iter().for_each(Disk::check);
}

#[test]
fn commits_of_two_images_at_once_are_refused_and_one_after_the_other_leaves_a_short_chain() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let [base, s1, _, top] = chain(&mut busy, dir.path());
    let commit = |id: &str, top: &str, base: &str| json!({"job-id": id, "device": "s3", "top-node": top, "base-node": base, "speed": SLOW});
    busy.run("block-commit", commit("c", "s2", "s1"));
    assert!(busy.qmp.execute("block-commit", commit("d", "s1", "disk0")).is_err());
    busy.hurry("c");
    busy.wait_completed("c");
    busy.run("block-commit", commit("d", "s1", "disk0"));
    busy.hurry("d");
    busy.wait_completed("d");
    let contents = busy.finish();
    check_image(&top, &contents[0]);
    assert_eq!(backing(&top), Some(base.file()));
    s1.check();
}

/// Streams into the guest's image; gives the chain and what it must have.
fn stream(arguments: &Value) -> (tempfile::TempDir, [Disk; 4], Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start(dir.path(), 1);
    let chain = chain(&mut busy, dir.path());
    let mut all = json!({"job-id": "s", "device": "s3", "speed": SLOW});
    all.as_object_mut().unwrap().extend(arguments.as_object().unwrap().clone());
    busy.run("block-stream", all);
    busy.hurry("s");
    busy.wait_completed("s");
    busy.check();
    assert_eq!(busy.used_nodes(), ["s3"]);
    assert!(!busy.has_node("s2"), "nobody uses it");
    let contents = busy.finish().remove(0);
    check_image(&chain[3], &contents);
    chain.iter().for_each(Disk::check);
    (dir, chain, contents)
}

#[test]
fn a_stream_of_all_images_leaves_one_that_stands_alone() {
    if !require::kvm() {
        return;
    }
    let (_dir, [base, s1, s2, top], contents) = stream(&json!({}));
    assert_eq!(backing(&top), None);
    // It is right without the files of the others.
    for disk in [base, s1, s2] {
        std::fs::remove_file(&disk.path).unwrap();
    }
    check_image(&top, &contents);
}

#[test]
fn a_stream_down_to_a_base_leaves_the_base_below() {
    if !require::kvm() {
        return;
    }
    let (dir, [_, s1, s2, top], contents) = stream(&json!({"base-node": "s1"}));
    assert_eq!(backing(&top), Some(s1.file()));
    std::fs::remove_file(&s2.path).unwrap();
    check_image(&top, &contents);
    let raw = dir.path().join("wanted").display().to_string();
    std::fs::write(&raw, &contents).unwrap();
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &top.file(), &raw]);
}
