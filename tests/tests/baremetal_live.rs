//! Live saves: a guest that writes all the time to memory and disk is saved at any moment, and every
//! checkpoint is one instant of it. The guest itself looks: see `chain` and `disk_chain` in `guest.s`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::chains::Chains;
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::virtio::DISK_COUNT;
use tardigrade_tests::baremetal::{Monitor, machine_with_disk, monitor};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::events;
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

const DISK: &[&str] = &["disk0"];

fn disk(dir: &Path) -> Disk {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }
}

/// Runs a save to its end; gives the job.
fn save(vm: &Vm, tag: &str, mode: &str) -> Value {
    let mut qmp = vm.qmp();
    let mut arguments = events::target(tag, DISK);
    arguments["job-id"] = json!(tag);
    arguments["x-mode"] = json!(mode);
    qmp.execute("snapshot-save", arguments).unwrap();
    qmp.wait_event(Duration::from_secs(120), |event| {
        event["data"]["id"] == tag && event["data"]["status"] == "concluded"
    })
    .unwrap();
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == tag).unwrap().clone();
    qmp.execute("job-dismiss", json!({ "id": tag })).unwrap();
    assert_eq!(job["error"], Value::Null, "{}", vm.stderr());
    job
}

#[test]
fn every_checkpoint_of_a_guest_that_writes_all_the_time_is_one_instant() {
    if !require::kvm() {
        return;
    }
    const CHAINS: Chains = Chains { pages: 3000 };
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "64M", 3);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    let tags: Vec<String> = (0..8).map(|n| format!("t{n}")).collect();
    for (n, tag) in tags.iter().enumerate() {
        let job = save(&vm, tag, if n % 4 == 3 { "stop" } else { "live" });
        assert!(job["x-pause-ns"].as_u64().unwrap() > 0, "{job}");
        assert!(job["x-bytes-written"].as_u64().unwrap() > 0, "{job}");
        assert_eq!(job["x-incremental"], n > 0, "{job}");
        let disk = guest.peek(DISK_COUNT);
        guest.wait_word(DISK_COUNT, |now| now > disk + n as u64);
    }
    for n in [3, 0, 7, 1, 6, 2, 5, 4] {
        vm.load(&tags[n], DISK);
        CHAINS.go_on(&mut guest);
        // A checkpoint of a branch is built upon the one that was loaded.
        let branch = format!("{}-branch", tags[n]);
        assert_eq!(save(&vm, &branch, "live")["x-incremental"], true);
        vm.delete(&tags[n], DISK);
        vm.load(&branch, DISK);
        CHAINS.go_on(&mut guest);
    }
    CHAINS.stop(&mut guest);
    let stats = vm.qmp().execute("x-query-checkpoint-stats", json!({})).unwrap();
    assert!(stats["saves"].as_u64().unwrap() >= 16, "{stats}");
    vm.quit();
    disk(dir.path()).check();
    let vm = spec.args(&["--loadvm", "t6-branch"]).start();
    let mut guest = Monitor::connect(vm.serial_path());
    CHAINS.go_on(&mut guest);
    CHAINS.stop(&mut guest);
    vm.quit();
}

#[test]
fn a_guest_that_dirties_more_than_can_be_copied_is_saved_all_the_same() {
    if !require::kvm() {
        return;
    }
    const CHAINS: Chains = Chains { pages: 14000 };
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 3).start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    for tag in ["a", "b"] {
        save(&vm, tag, "live");
        CHAINS.go_on(&mut guest);
    }
    for tag in ["a", "b", "a"] {
        vm.load(tag, DISK);
        CHAINS.go_on(&mut guest);
    }
    CHAINS.stop(&mut guest);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn an_idle_guest_of_a_gibibyte_writes_less_than_a_hundredth_of_it_the_second_time() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "1G", 1).start();
    let mut guest = monitor(&vm);
    guest.fill(FREE..64 << 20, 1);
    let first = save(&vm, "first", "live");
    assert_eq!(first["x-incremental"], false);
    assert!(first["x-bytes-written"].as_u64().unwrap() >= 62 << 20, "{first}");
    let second = save(&vm, "second", "live");
    assert_eq!(second["x-incremental"], true);
    assert!(second["x-bytes-written"].as_u64().unwrap() < 10 << 20, "{second}");
    guest.fill(FREE..64 << 20, 2);
    vm.load("second", DISK);
    guest.verify(FREE..64 << 20, 1);
    vm.delete("first", DISK);
    vm.load("second", DISK);
    guest.verify(FREE..64 << 20, 1);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn without_dirty_tracking_every_save_stops_the_guest_and_writes_all() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "32M", 1);
    let mut vm = spec.args(&["--machine", "microvm,dirty-tracking=off"]).start();
    let mut guest = monitor(&vm);
    guest.fill(FREE..16 << 20, 1);
    for tag in ["a", "b"] {
        let job = save(&vm, tag, "live");
        assert_eq!(job["x-incremental"], false);
        assert!(job["x-bytes-written"].as_u64().unwrap() >= 14 << 20, "{job}");
    }
    guest.fill(FREE..16 << 20, 2);
    vm.load("a", DISK);
    guest.verify(FREE..16 << 20, 1);
    vm.quit();
}

#[test]
fn a_reset_between_saves_makes_the_next_one_whole() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    let mut guest = monitor(&vm);
    guest.fill(FREE..32 << 20, 1);
    save(&vm, "before", "live");
    vm.qmp().execute("system_reset", json!({})).unwrap();
    guest.wait_started();
    guest.fill(16 << 20..24 << 20, 2);
    assert_eq!(save(&vm, "after", "live")["x-incremental"], false);
    guest.fill(16 << 20..24 << 20, 3);
    vm.load("after", DISK);
    guest.verify(16 << 20..24 << 20, 2);
    guest.verify_zero(FREE..16 << 20);
    vm.load("before", DISK);
    guest.verify(FREE..32 << 20, 1);
    vm.quit();
}

#[test]
fn a_machine_killed_at_any_moment_of_a_live_save_has_its_earlier_checkpoints() {
    if !require::kvm() {
        return;
    }
    const CHAINS: Chains = Chains { pages: 6000 };
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "64M", 3);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    vm.save("good", DISK);
    vm.quit();
    let revive = spec.clone().args(&["--loadvm", "good"]);
    for moment in 0..6 {
        let vm = revive.start();
        let mut guest = Monitor::connect(vm.serial_path());
        CHAINS.go_on(&mut guest);
        let mut qmp = vm.qmp();
        let mut arguments = events::target("doomed", DISK);
        arguments["job-id"] = json!("doomed");
        qmp.execute("snapshot-save", arguments).unwrap();
        // The guest is not talked to meanwhile: a checkpoint would have half of it.
        match moment {
            0 => {}
            1 => drop(qmp.wait_event(Duration::from_secs(60), |e| e["event"] == "STOP")),
            2 => drop(qmp.wait_event(Duration::from_secs(60), |e| e["event"] == "RESUME")),
            more => {
                for _ in 0..more * 30 {
                    qmp.execute("query-jobs", json!({})).unwrap();
                }
            }
        }
        vm.signal(libc::SIGKILL);
        drop(vm);
        let path = disk(dir.path()).path.display().to_string();
        qemu_img(&["check", "-q", "-r", "leaks", &path]);
        disk(dir.path()).check();
        // It may have been quick enough.
        if qemu_img(&["snapshot", "-l", &path]).contains("doomed") {
            let vm = spec.clone().args(&["--loadvm", "doomed"]).start();
            let mut guest = Monitor::connect(vm.serial_path());
            CHAINS.go_on(&mut guest);
            CHAINS.stop(&mut guest);
            let mut vm = vm;
            vm.delete("doomed", DISK);
            vm.quit();
        }
    }
    let vm = revive.start();
    let mut guest = Monitor::connect(vm.serial_path());
    CHAINS.go_on(&mut guest);
    CHAINS.stop(&mut guest);
    vm.quit();
}

#[test]
fn a_live_save_that_is_cancelled_leaves_the_guest_and_the_disk_as_they_were() {
    if !require::kvm() {
        return;
    }
    const CHAINS: Chains = Chains { pages: 6000 };
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 3).start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    save(&vm, "good", "live");
    let mut cancelled = 0;
    for n in 0..12 {
        let id = format!("c{n}");
        let mut qmp = vm.qmp();
        let mut arguments = events::target(&id, DISK);
        arguments["job-id"] = json!(id);
        qmp.execute("snapshot-save", arguments).unwrap();
        if n % 2 == 1 {
            let wanted = if n % 4 == 1 { "STOP" } else { "RESUME" };
            qmp.wait_event(Duration::from_secs(60), |event| event["event"] == wanted).unwrap();
        }
        // It may be over already.
        let _ = qmp.execute("job-cancel", json!({ "id": id }));
        qmp.wait_event(Duration::from_secs(60), |event| {
            event["data"]["id"] == id.as_str() && event["data"]["status"] == "concluded"
        })
        .unwrap();
        let jobs = qmp.execute("query-jobs", json!({})).unwrap();
        let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id.as_str()).unwrap();
        if job["error"] == "Operation canceled" {
            cancelled += 1;
        } else {
            assert_eq!(job["error"], Value::Null, "{}", vm.stderr());
            vm.load(&id, DISK);
        }
        CHAINS.go_on(&mut guest);
    }
    assert!(cancelled > 0);
    // What the cancelled saves had taken is in this one.
    save(&vm, "last", "live");
    CHAINS.go_on(&mut guest);
    for tag in ["last", "good"] {
        vm.load(tag, DISK);
        CHAINS.go_on(&mut guest);
    }
    CHAINS.stop(&mut guest);
    vm.quit();
    disk(dir.path()).check();
}

/// Saves the machine, whose chains write all the time, and resets it after `skip` events of that name, or
/// when the save is over. Says whether the checkpoint is of the guest before the reset: a save may pause more
/// than once, and its moment is in the last pause.
fn save_with_a_reset_in_the_middle(vm: &Vm, tag: &str, event: &str, skip: usize) -> bool {
    let mut qmp = vm.qmp();
    let mut arguments = events::target(tag, DISK);
    arguments["job-id"] = json!(tag);
    qmp.execute("snapshot-save", arguments).unwrap();
    let mut told: Vec<String> = Vec::new();
    let mut next = |qmp: &mut Client| {
        let event = qmp.wait_event(Duration::from_secs(120), |_| true).unwrap();
        told.push(event["event"].as_str().unwrap().to_owned());
        let over = event["data"]["id"] == tag && event["data"]["status"] == "concluded";
        (over, told.clone())
    };
    let (mut over, mut events) = (false, Vec::new());
    while !over && events.iter().filter(|name| *name == event).count() <= skip {
        (over, events) = next(&mut qmp);
    }
    qmp.execute("system_reset", json!({})).unwrap();
    while !over || !events.iter().any(|name| name == "RESET") {
        let (now_over, all) = next(&mut qmp);
        (over, events) = (over || now_over, all);
    }
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    assert_eq!(jobs[0]["error"], Value::Null, "{}", vm.stderr());
    qmp.execute("job-dismiss", json!({ "id": tag })).unwrap();
    let last = |wanted: &str| events.iter().rposition(|name| name == wanted);
    last("STOP") < last("RESET")
}

/// Saves and resets in turn, at the moments given, then goes back to all checkpoints.
fn resets_in_the_middle_of_saves(moments: [(&str, &str, usize); 3]) {
    if !require::kvm() {
        return;
    }
    const CHAINS: Chains = Chains { pages: 14000 };
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "64M", 3).start();
    let mut guest = monitor(&vm);
    let saved = moments.map(|(tag, event, skip)| {
        CHAINS.start(&mut guest);
        let before = save_with_a_reset_in_the_middle(&vm, tag, event, skip);
        guest.wait_started();
        (tag, before)
    });
    for at in [1, 2, 0] {
        let (tag, before) = saved[at];
        vm.load(tag, DISK);
        if before {
            CHAINS.go_on(&mut guest);
        } else {
            assert_eq!(guest.peek(FREE), 0, "{tag}: memory of before the reset");
            CHAINS.start(&mut guest);
        }
    }
    CHAINS.stop(&mut guest);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn a_reset_in_the_middle_of_a_save_waits_for_what_the_save_still_reads() {
    // The guest runs again, and what is saved is in its memory still.
    resets_in_the_middle_of_saves([("a", "RESUME", 0), ("b", "RESUME", 1), ("c", "RESUME", 0)]);
}

#[test]
fn a_reset_in_the_pause_of_a_save_waits_for_what_the_save_still_reads() {
    // The first pause finds too much to be copied, in the second memory is guarded.
    resets_in_the_middle_of_saves([("a", "STOP", 1), ("b", "STOP", 0), ("c", "STOP", 1)]);
}
