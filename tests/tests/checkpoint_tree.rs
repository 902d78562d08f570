//! What checkpoints tell of themselves: parents, descriptions, sizes, machines; and machines revived
//! from that alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tardigrade_tests::baremetal::chains::Chains;
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::{machine, machine_with_disk, monitor};
use tardigrade_tests::cli::{fail, succeed};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::refusal::fails;
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec};

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;

/// The first column of a drawn tree, without its header.
fn drawn(list: &str) -> Vec<String> {
    let name = |line: &str| line.split_once("  20").unwrap().0.trim_end().to_owned();
    list.lines().skip(1).map(name).collect()
}

fn query(vm: &Vm, arguments: Value) -> Vec<Value> {
    let answer = vm.qmp().execute("x-query-checkpoints", arguments).unwrap();
    answer.as_array().unwrap().clone()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_tree_is_drawn_of_a_running_machine_and_of_its_image() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    let qmp = path(vm.qmp_path()).to_owned();
    let list = || succeed(&["snapshot", "list", "--qmp", &qmp]);
    assert_eq!(list(), "No checkpoints.\n");
    let mut guest = monitor(&vm);
    guest.fill(FREE..32 * MIB, 1);
    vm.save("booted", DISK);
    let save = ["snapshot", "save", "--qmp", &qmp, "try-1", "--description", "the old driver"];
    succeed(&[&save[..], &["--label", "job=17", "--label", "empty="]].concat());
    vm.save("later", DISK);
    vm.load("booted", DISK);
    vm.save("try-2", DISK);
    let wanted = ["● booted", "├─○ try-1", "│ ○ later", "└─○ try-2  <-"];
    let listed = list();
    assert_eq!(drawn(&listed), wanted, "{listed}");
    assert!(listed.contains("the old driver [empty=] [job=17]"), "{listed}");

    let try_1 = query(&vm, json!({ "tag": "try-1" })).remove(0);
    assert_eq!(try_1["parent"]["tag"], "booted");
    assert_eq!(try_1["parent"], try_1["nearest"]);
    assert_eq!(try_1["labels"][1], json!({ "key": "job", "value": "17" }));
    assert_eq!(try_1["machine"]["ram-bytes"], 64 * MIB);
    assert_eq!(try_1["machine"]["devices"][2]["disk"]["node-name"], "disk0");
    assert!(try_1["places"][0]["vm-state"]["alone"].as_u64().unwrap() > 0);
    let quick = query(&vm, json!({ "sizes": false }));
    assert!(quick.iter().all(|one| one["places"][0].get("vm-state").is_none()), "{quick:?}");

    vm.delete("try-1", DISK);
    let listed = list();
    assert_eq!(drawn(&listed), ["● booted", "├─○ later", "└─○ try-2  <-"], "{listed}");
    assert!(listed.contains("(from 'try-1', deleted)"), "{listed}");
    let locked = fail(&["snapshot", "list", "--image", path(&image)]);
    assert!(locked.contains("lock"), "{locked}");
    vm.quit();

    let offline = succeed(&["snapshot", "list", "--image", path(&image)]);
    assert_eq!(drawn(&offline), ["● booted", "├─○ later", "└─○ try-2"], "{offline}");
    assert_eq!(succeed(&["image", "snapshot", "list", "--tree", path(&image)]), offline);
    let table = succeed(&["image", "snapshot", "-l", path(&image)]);
    assert!(table.starts_with("Snapshot list:\n"), "{table}");
    let json = succeed(&["snapshot", "list", "--image", path(&image), "--output", "json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[1]["checkpoint"]["tag"], "later");
    assert_eq!(json[1]["nearest"]["tag"], "booted");
    Disk { path: image, format: "qcow2" }.check();
}

#[test]
fn a_tag_that_is_used_again_is_not_taken_for_the_parent_of_what_was_saved_before() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    vm.save("a", DISK);
    vm.save("b", DISK);
    vm.delete("a", DISK);
    vm.save("a", DISK);
    let list = succeed(&["snapshot", "list", "--qmp", path(vm.qmp_path())]);
    assert_eq!(drawn(&list), ["● b", "○ a  <-"], "{list}");
    assert!(list.contains("(from 'a', which is not here)"), "{list}");
    vm.quit();
}

#[test]
fn descriptions_and_labels_that_cannot_be_kept_are_refused_before_anything_is_done() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with_disk(dir.path(), "64M", 1).start();
    let save = |more: Value| {
        let mut arguments =
            json!({ "job-id": "j", "tag": "t", "vmstate": "disk0", "devices": ["disk0"] });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vm.qmp().execute("snapshot-save", arguments).unwrap_err().to_string()
    };
    let error = save(json!({ "x-description": "x".repeat(5000) }));
    assert!(error.contains("the description has 5000 bytes"), "{error}");
    let label = json!({ "key": "k", "value": "v" });
    let error = save(json!({ "x-labels": [label, label] }));
    assert!(error.contains("label 'k' is given twice"), "{error}");
    let error = save(json!({ "x-labels": [{ "key": "a=b", "value": "" }] }));
    assert!(error.contains("label 'a=b'"), "{error}");
    let jobs = vm.qmp().execute("query-jobs", json!({})).unwrap();
    assert_eq!(jobs, json!([]));
    let qmp = path(vm.qmp_path());
    let error = fail(&["snapshot", "save", "--qmp", qmp, "t", "--label", "novalue"]);
    assert!(error.contains("--label novalue: is not KEY=VALUE"), "{error}");
    vm.quit();
}

#[test]
fn show_tells_the_machine_of_a_checkpoint() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 2)
        .args(&["--device", "virtio-rng-device,id=entropy", "--name", "water bear"])
        .start();
    vm.save("first", DISK);
    vm.save("second", DISK);
    let shown = succeed(&["snapshot", "show", "--qmp", path(vm.qmp_path()), "second"]);
    for wanted in [
        "checkpoint:   second\n",
        "parent:       first\n",
        "machine:      microvm, 64.0 MiB of RAM, 2 vCPUs\n",
        "name:         water bear\n",
        "guest.elf\n",
        "device:       serial at port 0x3f8, interrupt 4\n",
        "device:       virtio-rng 'entropy' at 0xd0001000, interrupt 6\n",
        "disk0: qcow2 16.0 MiB writable, serial 'disk0', ",
        "disk0.qcow2, with RAM and devices\n",
        "RAM and devices ",
    ] {
        assert!(shown.contains(wanted), "'{wanted}' is missing:\n{shown}");
    }
    vm.quit();
    qemu_img(&["snapshot", "-c", "disks", path(&image)]);
    let show = |tag: &str| succeed(&["snapshot", "show", "--image", path(&image), tag]);
    assert!(show("second").contains("parent:       first\n"), "{}", show("second"));
    assert!(show("disks").contains("none: a snapshot of disks only"), "{}", show("disks"));
    let error = fail(&["snapshot", "show", "--image", path(&image), "third"]);
    assert!(error.contains("no disk has a checkpoint 'third'"), "{error}");
}

/// A machine revived with these options and nothing else.
fn restore(checkpoint: &str) -> VmSpec {
    VmSpec::bare().args(&["--restore", checkpoint])
}

#[test]
fn a_machine_is_revived_from_its_image_alone() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "160M", 2)
        .args(&["--device", "virtio-rng-device,id=entropy", "--name", "water bear"])
        .start();
    monitor(&vm).fill(FREE..96 * MIB, 7);
    vm.save("here", DISK);
    monitor(&vm).fill(FREE..96 * MIB, 8);
    vm.quit();
    // Nothing of it is needed any more, and the image has another name.
    std::fs::remove_file(dir.path().join("guest.elf")).unwrap();
    let moved = dir.path().join("elsewhere#2.qcow2");
    std::fs::rename(&image, &moved).unwrap();

    let checkpoint = format!("{}#here", moved.display());
    let mut vm = restore(&checkpoint).start();
    monitor(&vm).verify(FREE..96 * MIB, 7);
    let name = vm.qmp().execute("query-name", json!({})).unwrap();
    assert_eq!(name["name"], "water bear");
    assert_eq!(
        vm.qmp().execute("query-cpus-fast", json!({})).unwrap().as_array().unwrap().len(),
        2
    );
    vm.save("again", DISK);
    let list = succeed(&["snapshot", "list", "--qmp", path(vm.qmp_path())]);
    assert_eq!(drawn(&list), ["● here", "○ again  <-"], "{list}");
    // The kernel it was booted from is gone: a reset says so.
    let reset = vm.qmp().execute("system_reset", json!({}));
    let error = reset.map(|_| vm.stderr()).unwrap_or_else(|error| error.to_string());
    assert!(error.contains("guest.elf"), "{error}");
    vm.quit();
    // What was revived can be revived, and --loadvm takes it with the same options said by hand.
    let again = format!("{}#again", moved.display());
    let vm = restore(&again).start();
    monitor(&vm).verify(FREE..96 * MIB, 7);
    vm.quit();
    Disk { path: moved, format: "qcow2" }.check();
}

#[test]
fn a_machine_that_cannot_be_started_leaves_the_disks_as_they_were() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let other = Disk::qcow2(dir.path().join("disk1.qcow2"), "16M");
    let spec = machine_with_disk(dir.path(), "64M", 1).disk(&other);
    let mut vm = spec.start();
    vm.save("t", &["disk0", "disk1"]);
    vm.quit();
    let disks = [Disk { path: image, format: "qcow2" }, other];
    for disk in &disks {
        let write = ["-c", "write -P 0x77 1M 64k", &disk.file()];
        let ended = Command::new("qemu-io").args(write).stdout(Stdio::null()).status().unwrap();
        assert!(ended.success());
    }
    let contents = || [disks[0].read(None), disks[1].read(None)];
    let now = contents();

    let checkpoint = format!("{}#t", disks[0].file());
    let args: Vec<_> = spec.arguments().iter().map(String::as_str).collect();
    let loads = [[&args[..], &["--loadvm", "t"]].concat(), vec!["--restore", &checkpoint]];
    let bad = [
        ["--qmp", "unix:/nonexistent/qmp,server=on,wait=off"],
        ["--nbd-server", "addr.type=unix,addr.path=/nonexistent/nbd"],
        ["--export", "type=nbd,id=e,node-name=nope"],
    ];
    for load in &loads {
        for bad in &bad {
            let error = fails(&[&load[..], &["--serial", "null"], bad].concat());
            assert!(error.contains(bad[0]), "{error}");
            assert!(contents() == now, "{bad:?} has changed a disk");
        }
    }
    disks.iter().for_each(Disk::check);
    // It is the load that takes them back.
    restore(&checkpoint).start().quit();
    let then = contents();
    assert!(then[0] != now[0] && then[1] != now[1]);
}

#[test]
fn a_tag_longer_than_a_table_keeps_is_found_by_all_of_it_everywhere() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let other = Disk::qcow2(dir.path().join("disk1.qcow2"), "16M");
    let tag = "ä".repeat(200);
    let machine = machine_with_disk(dir.path(), "64M", 1).disk(&other);
    let mut vm = machine.start();
    // The disk with the state is not the one that is looked at where nothing else tells.
    vm.save(&tag, &["disk1", "disk0"]);
    assert_eq!(query(&vm, json!({ "tag": tag })).len(), 1);
    vm.save("next", &["disk1", "disk0"]);
    let next = query(&vm, json!({ "tag": "next" })).remove(0);
    assert_eq!(next["parent"]["tag"], "ä".repeat(127));
    assert_eq!(next["parent"], next["nearest"]);
    vm.delete("next", &["disk1", "disk0"]);
    vm.quit();
    let shown = succeed(&["snapshot", "show", "--image", &other.file(), &tag]);
    assert!(shown.contains(&"ä".repeat(127)), "{shown}");
    machine.args(&["--loadvm", &tag]).start().quit();
    restore(&format!("{}#{tag}", other.file())).start().quit();
    assert_eq!(Disk { path: image, format: "qcow2" }.tags(), ["ä".repeat(127)]);
}

#[test]
fn a_checkpoint_is_dated_when_the_guest_stood_still_not_when_all_was_written() {
    if !require::kvm() {
        return;
    }
    // It writes so much that most is saved when it runs again.
    const CHAINS: Chains = Chains { pages: 14000 };
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with_disk(dir.path(), "64M", 3).start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    let mut qmp = vm.qmp();
    let arguments = json!({ "job-id": "j", "tag": "t", "vmstate": "disk0", "devices": ["disk0"] });
    qmp.execute("snapshot-save", arguments).unwrap();
    // It may be stopped more than once: the last time counts.
    let (mut stopped, mut ran_on) = (0, 0);
    loop {
        let event = qmp.wait_event(std::time::Duration::from_secs(300), |_| true).unwrap();
        let part = |part| event["timestamp"][part].as_i64().unwrap();
        let time = part("seconds") * 1_000_000 + part("microseconds");
        match event["event"].as_str().unwrap() {
            "STOP" => stopped = time,
            "RESUME" => ran_on = time,
            _ if event["data"]["status"] == "concluded" => break,
            _ => {}
        }
    }
    let checkpoint = query(&vm, json!({ "tag": "t" })).remove(0)["checkpoint"].take();
    let part = |part| checkpoint[part].as_i64().unwrap();
    let date = part("date-sec") * 1_000_000 + part("date-nsec") / 1000;
    assert!((stopped..=ran_on).contains(&date), "{stopped} {date} {ran_on}");
    CHAINS.stop(&mut guest);
    vm.quit();
}

#[test]
fn the_other_disks_are_found_beside_the_image_or_given() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::create_dir_all(old.join("more")).unwrap();
    std::fs::create_dir_all(new.join("more")).unwrap();
    let second = Disk::qcow2(old.join("more/second.qcow2"), "8M");
    let first = Disk::qcow2(old.join("first.qcow2"), "16M");
    let mut vm = machine(&old, "64M", 1).disk(&second).disk(&first).start();
    monitor(&vm).fill(FREE..20 * MIB, 3);
    // The VM state is on the second disk of the machine.
    vm.job("snapshot-save", "both", &["disk1", "disk0"]).unwrap();
    succeed(&["snapshot", "load", "--qmp", path(vm.qmp_path()), "both"]);
    vm.quit();

    let in_place = restore(&format!("{}#both", first.file()));
    let vm = in_place.start();
    monitor(&vm).verify(FREE..20 * MIB, 3);
    vm.quit();

    let copy = new.join("first.qcow2");
    std::fs::copy(&first.path, &copy).unwrap();
    let checkpoint = format!("{}#both", copy.display());
    // The original is no copy.
    let (status, error) = restore(&checkpoint).run();
    assert!(!status.success());
    assert!(error.contains("--restore ") && error.contains("disk 'disk0' was '"), "{error}");
    assert!(error.contains("--blockdev driver=qcow2,node-name=disk0"), "{error}");
    std::fs::copy(&second.path, new.join("more/second.qcow2")).unwrap();
    let vm = restore(&checkpoint).start();
    monitor(&vm).verify(FREE..20 * MIB, 3);
    vm.quit();
    std::fs::rename(new.join("more/second.qcow2"), new.join("third.qcow2")).unwrap();
    let given = format!(
        "driver=qcow2,node-name=disk0,file.driver=file,file.filename={}",
        new.join("third.qcow2").display()
    );
    let vm = restore(&checkpoint).args(&["--blockdev", &given]).start();
    monitor(&vm).verify(FREE..20 * MIB, 3);
    vm.quit();
    // The other image has the disk only.
    let (_, error) = restore(&format!("{}#both", second.file())).run();
    assert!(error.contains("name the image with RAM and devices"), "{error}");
}

#[test]
fn what_cannot_be_restored_is_told_with_what_there_is() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    vm.save("one", DISK);
    vm.save("two", DISK);
    let (_, error) = restore(&format!("{}#one", image.display())).run();
    assert!(error.contains("lock"), "somebody uses it: {error}");
    vm.quit();
    let refused = |checkpoint: &str, more: &[&str]| {
        let (status, error) = restore(checkpoint).args(more).run();
        assert_eq!(status.code(), Some(1), "{checkpoint} {more:?}");
        error
    };
    let error = refused(&format!("{}#three", image.display()), &[]);
    assert!(error.contains("no checkpoint 'three'; there are: one, two"), "{error}");
    let error = refused("/nonexistent#one", &[]);
    assert!(error.contains("/nonexistent"), "{error}");
    assert!(refused("one", &[]).contains("--restore one: is not IMAGE#TAG"));
    let there = format!("{}#one", image.display());
    for option in
        [["-m", "64M"], ["--smp", "1"], ["--device", "virtio-rng-device"], ["--loadvm", "x"]]
    {
        let error = refused(&there, &option);
        assert!(error.contains("--restore takes it from the checkpoint"), "{option:?}: {error}");
    }
    assert!(refused(&there, &["--machine", "none"]).contains("no guest with --machine none"));
}
