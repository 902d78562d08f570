//! A host that is out of space, and a process that is killed, in the middle of a save.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};
use tardigrade_tests::counter::{self, Running, snapshot};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::full::Small;
use tardigrade_tests::{pattern, require};

#[test]
fn a_save_without_space_fails_gives_all_back_and_works_once_there_is_space() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(dir.path().join("small"), 32 << 20) else { return };
    let disks = [
        Disk::qcow2(small.path().join("disk0.qcow2"), "64M"),
        Disk::qcow2(small.path().join("disk1.qcow2"), "64M"),
    ];
    let spec = counter::spec(dir.path(), 8 << 20).disk(&disks[0]).disk(&disks[1]);
    let mut vm = Running::start(&spec);
    let both = ["disk0", "disk1"];
    let space = small.free();
    let stopped = ["STOP".to_owned(), "RESUME".to_owned()];
    // From nothing to nearly enough: the space ends within RAM, tables, or one of the two nodes.
    let need = {
        vm.done("snapshot-save", snapshot("measure", &both));
        let need = space - small.free();
        vm.done("snapshot-delete", json!({ "tag": "measure", "devices": both }));
        need
    };
    assert!(need > 8 << 20, "a save takes {need} bytes");
    vm.check_alive();
    let mut failures = 0;
    let ends = (0..8).map(|k| need * k / 8).chain((1..16).map(|k| need - (k * (16 << 10))));
    for (round, left) in ends.enumerate() {
        small.leave(left);
        let before = small.free();
        let tag = format!("full{round}");
        let (result, events) = vm.job("snapshot-save", snapshot(&tag, &both));
        // The first copy is made with the guest running: a save that ends there never stops it.
        let never = result.is_err() && events.is_empty();
        assert!(never || events == stopped, "{left} bytes left: {result:?}, {events:?}");
        vm.check_alive();
        if let Err(error) = result {
            failures += 1;
            assert!(error.contains("No space left on device"), "{left} bytes left: {error}");
            assert!(
                error.starts_with("Error while writing VM state")
                    || error.starts_with("Could not create"),
                "{error}"
            );
            let after = small.free();
            assert!(after >= before, "{left} left: {before} free before, {after} after");
        } else {
            vm.done("snapshot-delete", json!({ "tag": tag, "devices": both }));
        }
        vm.check_alive();
    }
    assert!(failures >= 8, "{failures} saves failed");
    small.give_back();
    vm.done("snapshot-save", snapshot("fits", &both));
    let count = vm.count();
    vm.check_alive();
    vm.done("snapshot-load", snapshot("fits", &both));
    vm.expect_count(count);
    vm.vm.quit();
    for disk in &disks {
        disk.check();
        assert_eq!(disk.tags(), ["fits"]);
    }
}

/// `qemu-img check`: whatever it finds are leaks.
fn only_leaks(disk: &Disk) {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "-f", "qcow2", &disk.file()])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["corruptions"].is_null() && report["check-errors"] == 0, "{report}");
    assert!(matches!(output.status.code(), Some(0 | 3)), "{report}");
}

#[test]
fn a_process_killed_during_a_save_leaves_valid_images_with_every_earlier_checkpoint() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = [
        Disk::qcow2(dir.path().join("disk0.qcow2"), "64M"),
        Disk::qcow2(dir.path().join("disk1.qcow2"), "64M"),
    ];
    let both = ["disk0", "disk1"];
    let spec = counter::spec(dir.path(), 16 << 20).disk(&disks[0]).disk(&disks[1]);
    let mut vm = Running::start(&spec);
    let started = Instant::now();
    vm.done("snapshot-save", snapshot("kept", &both));
    let took = started.elapsed();
    let kept = vm.count();
    vm.vm.quit();

    let mut cut = 0;
    for round in 0..12_u32 {
        let mut vm = Running::start(&revived(&spec, "kept"));
        assert_eq!(vm.count(), kept.wrapping_add(1));
        let tag = format!("cut{round}");
        let mut arguments = snapshot(&tag, &both);
        arguments["job-id"] = json!("cut");
        vm.qmp.execute("snapshot-save", arguments).unwrap();
        // The moment is what is tested, and spread over the time that a save takes.
        let seed = pattern::word(u64::from(std::process::id()), u64::from(round)) % 100;
        let share = (round * 100 / 12 + u32::try_from(seed).unwrap() / 12).min(110);
        std::thread::sleep(took * share / 100);
        vm.vm.signal(libc::SIGKILL);
        vm.vm.wait();
        disks.iter().for_each(only_leaks);
        let tags: Vec<_> = disks.iter().map(Disk::tags).collect();
        assert!(tags.iter().all(|tags| tags.contains(&"kept".to_owned())), "{tags:?}");
        let on = tags.iter().filter(|tags| tags.contains(&tag)).count();
        cut += usize::from(on < 2);
        check_partial(&spec, &tag, on, kept);
    }
    eprintln!("a save takes {took:?}; {cut} of 12 were cut short");
    assert!(cut > 0, "every save was done before the process was killed");

    // Work goes on, the leaks can be had back, and all is whole.
    let mut vm = Running::start(&revived(&spec, "kept"));
    assert_eq!(vm.count(), kept.wrapping_add(1));
    vm.done("snapshot-save", snapshot("next", &both));
    vm.vm.quit();
    for disk in &disks {
        repair_leaks(&disk.path);
        disk.check();
    }
    let vm = Running::start(&revived(&spec, "next"));
    assert_eq!(vm.count(), kept.wrapping_add(2));
    vm.vm.quit();
}

fn revived(spec: &tardigrade_tests::vm::VmSpec, tag: &str) -> tardigrade_tests::vm::VmSpec {
    spec.clone().args(&["--loadvm", tag])
}

/// The checkpoint of the killed save is whole on both disks, or is none.
fn check_partial(spec: &tardigrade_tests::vm::VmSpec, tag: &str, on: usize, kept: u8) {
    if on == 2 {
        let vm = Running::start(&revived(spec, tag));
        assert_eq!(vm.count(), kept.wrapping_add(2));
        vm.vm.quit();
        return;
    }
    let mut vm = Running::start(spec);
    let error = vm.refused("snapshot-load", snapshot(tag, &["disk0", "disk1"]));
    assert!(error.contains("does not exist in one or more devices"), "{error}");
    vm.done("snapshot-delete", json!({ "tag": tag, "devices": ["disk0", "disk1"] }));
    vm.vm.quit();
}

fn repair_leaks(image: &Path) {
    let status =
        Command::new("qemu-img").args(["check", "-q", "-r", "leaks"]).arg(image).status().unwrap();
    assert!(status.success(), "{status}");
}
