//! Checkpoints of the Linux guest: what is saved is what comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use serde_json::json;
use tardigrade_tests::agent::Agent;
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events::{run, target};
use tardigrade_tests::{pattern, require};

const ONE: Booted = Booted { vcpus: 1, disks: 1 };
const TWO: Booted = Booted { vcpus: 2, disks: 2 };

/// Where the tests write, and how much.
const PLACE: u64 = 32 << 20;
const LENGTH: usize = 256 << 10;

/// Memory, disk and file of the state `seed`.
fn change(agent: &mut Agent, seed: u64) {
    agent.ask(&format!("dirty 1 {seed}"));
    agent.ask(&format!("pattern vda {PLACE} {LENGTH} {seed}"));
}

/// Panics unless memory and disk are those of the state `seed`.
fn verify(agent: &mut Agent, seed: u64) {
    assert_eq!(agent.number("check-memory", "seed"), seed);
    agent.ask(&format!("verify vda {PLACE} {LENGTH} {seed}"));
}

/// What QEMU reads at the place where the tests write.
fn seen_by_qemu(disk: &Disk, tag: Option<&str>) -> Vec<u8> {
    disk.read(tag)[usize::try_from(PLACE).unwrap()..][..LENGTH].to_vec()
}

#[test]
fn a_load_brings_back_memory_both_disks_and_files() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = TWO.start(dir.path());
    let nodes = ["disk0", "disk1"];
    let mut agent = vm.agent();
    change(&mut agent, 1);
    agent.ask("mkfs vdb");
    agent.ask("mount vdb");
    agent.ask("write-file /mnt/kept 100000 1");
    agent.ask("sync");
    // In the page cache only: a checkpoint has it all the same.
    agent.ask("write-file /mnt/cached 50000 1");
    let memory = agent.ask("check-memory");
    vm.save("before", &nodes);

    change(&mut agent, 2);
    agent.ask("write-file /mnt/kept 100000 2");
    agent.ask("write-file /mnt/new 1000 2");
    agent.ask("umount");
    agent.ask("pattern vdb 0 1M 2");
    agent.ask("flush vdb");

    vm.load("before", &nodes);
    assert_eq!(agent.ask("check-memory"), memory);
    verify(&mut agent, 1);
    assert!(agent.try_ask("sum-file /mnt/new").is_err());
    agent.ask("verify-file /mnt/cached 1");
    agent.ask("sync");
    agent.ask("drop-caches");
    assert_eq!(agent.number("verify-file /mnt/kept 1", "bytes"), 100_000);
    assert_eq!(agent.number("verify-file /mnt/cached 1", "bytes"), 50_000);
    assert_eq!(agent.number("cpus", "online"), 2);

    // What the guest does now goes to the disks as they are now, not to the checkpoint.
    agent.ask("umount");
    change(&mut agent, 3);
    agent.ask("flush vda");
    vm.quit();
    let disks = TWO.disks(dir.path());
    disks.iter().for_each(Disk::check);
    assert_eq!(seen_by_qemu(&disks[0], Some("before")), pattern::bytes(1, PLACE, LENGTH));
    assert_eq!(seen_by_qemu(&disks[0], None), pattern::bytes(3, PLACE, LENGTH));

    // One checkpoint: one stamp on both disks, the VM state on the first alone.
    let stamps: Vec<_> = disks
        .iter()
        .map(|disk| {
            let info = disk.info();
            let snapshots = info["snapshots"].as_array().unwrap().clone();
            snapshots.into_iter().find(|snapshot| snapshot["name"] == "before").unwrap()
        })
        .collect();
    for field in ["date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"] {
        assert_eq!(stamps[0][field], stamps[1][field], "{field}");
    }
    assert!(stamps[0]["vm-state-size"].as_u64().unwrap() > 64 << 20);
    assert_eq!(stamps[1]["vm-state-size"], 0);
}

#[test]
fn a_new_process_revives_a_checkpoint_of_another() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut agent = vm.agent();
    change(&mut agent, 1);
    agent.ask("load cpu 1");
    vm.save("asleep", &["disk0"]);
    change(&mut agent, 2);
    vm.quit();

    let disk = ONE.disks(dir.path()).remove(0);
    disk.check();
    assert_eq!(seen_by_qemu(&disk, None), pattern::bytes(2, PLACE, LENGTH));
    let image = std::fs::read(&disk.path).unwrap();
    // Under another name, as after a move: the checkpoint does not care.
    let moved = Disk { path: dir.path().join("moved.qcow2"), format: "qcow2" };
    std::fs::write(&moved.path, image).unwrap();

    let vm = ONE.machine(std::slice::from_ref(&moved)).args(&["--loadvm", "asleep", "-S"]).start();
    let mut qmp = vm.qmp();
    assert_eq!(qmp.execute("query-status", json!({})).unwrap()["running"], false);
    let mut agent = vm.agent();
    qmp.execute("cont", json!({})).unwrap();
    verify(&mut agent, 1);
    let load = agent.fields("load stop");
    assert_eq!((load["cpu"].as_str(), load["cpu-errors"].as_str()), ("1", "0"));
    vm.quit();
    moved.check();
    assert_eq!(seen_by_qemu(&moved, None), pattern::bytes(1, PLACE, LENGTH));
}

#[test]
fn a_running_guest_is_stopped_for_a_save_and_runs_on() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = ONE.start(dir.path());
    let expected = ["created", "running", "STOP", "RESUME", "waiting", "pending", "concluded"];
    for command in ["snapshot-save", "snapshot-load"] {
        let (story, error) = run(&vm, command, target("running", &["disk0"]));
        assert_eq!((story, error), (expected.map(str::to_owned).to_vec(), None), "{command}");
        assert_eq!(vm.status(), "running");
        assert_eq!(vm.agent().ask("echo still there"), "still there");
    }
    let (story, error) =
        run(&vm, "snapshot-delete", json!({ "tag": "running", "devices": ["disk0"] }));
    assert_eq!(story, ["created", "running", "waiting", "pending", "concluded"]);
    assert_eq!(error, None);
    vm.quit();
    let disk = ONE.disks(dir.path()).remove(0);
    assert_eq!(disk.tags(), [TAG]);
    disk.check();
}

#[test]
fn a_stopped_guest_is_saved_and_loaded_and_stays_stopped() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = ONE.start(dir.path());
    let mut agent = vm.agent();
    change(&mut agent, 1);
    let mut qmp = vm.qmp();
    qmp.execute("stop", json!({})).unwrap();
    let expected = ["created", "running", "waiting", "pending", "concluded"];
    let (story, error) = run(&vm, "snapshot-save", target("stopped", &["disk0"]));
    assert_eq!((story, error), (expected.map(str::to_owned).to_vec(), None));
    assert_eq!(vm.status(), "paused");

    qmp.execute("cont", json!({})).unwrap();
    change(&mut agent, 2);
    qmp.execute("stop", json!({})).unwrap();
    let (story, error) = run(&vm, "snapshot-load", target("stopped", &["disk0"]));
    assert_eq!((story, error), (expected.map(str::to_owned).to_vec(), None));
    assert_eq!(vm.status(), "paused");
    qmp.execute("cont", json!({})).unwrap();
    verify(&mut agent, 1);

    // Whether the guest runs afterwards is decided by what it does now, not when it was saved.
    agent.ask("echo running");
    let (_, error) = run(&vm, "snapshot-load", target("stopped", &["disk0"]));
    assert_eq!(error, None);
    assert_eq!(vm.status(), "running");
    vm.quit();
    ONE.disks(dir.path())[0].check();
}

/// ```text
///   booted ── a ─┬─ b ── e
///                └─ c ── d
/// ```
#[test]
fn five_checkpoints_in_a_tree_are_loaded_in_any_order() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut agent = vm.agent();
    // Each also leaves a mark at a place of its own, which its descendants inherit.
    let own_place = |tag: &str| (48 << 20) + u64::from(tag.as_bytes()[0] - b'a') * (64 << 10);
    let seed = |tag: &str| u64::from(tag.as_bytes()[0]);
    let ancestry = [("a", "a"), ("b", "ab"), ("c", "ac"), ("d", "acd"), ("e", "abe")];
    let mut make = |vm: &mut tardigrade_tests::vm::Vm, tag: &str| {
        change(&mut agent, seed(tag));
        agent.ask(&format!("pattern vda {} 64K {}", own_place(tag), seed(tag)));
        vm.save(tag, &["disk0"]);
    };
    make(&mut vm, "a");
    make(&mut vm, "b");
    vm.load("a", &["disk0"]);
    make(&mut vm, "c");
    make(&mut vm, "d");
    vm.load("b", &["disk0"]);
    make(&mut vm, "e");

    // To a cousin, up to the root, down, to a sibling, to a child, and twice the same.
    for tag in ["d", "a", "c", "b", "e", "e", "c", "d"] {
        vm.load(tag, &["disk0"]);
        verify(&mut agent, seed(tag));
        let ancestors = ancestry.iter().find(|(name, _)| *name == tag).unwrap().1;
        for (other, _) in ancestry {
            let request = format!("verify vda {} 64K {}", own_place(other), seed(other));
            let there = agent.try_ask(&request).is_ok();
            assert_eq!(there, ancestors.contains(other), "the mark of '{other}' in '{tag}'");
        }
        // Whatever the guest does here must not show in another checkpoint.
        change(&mut agent, 1000);
    }
    vm.quit();

    let disk = ONE.disks(dir.path()).remove(0);
    disk.check();
    assert_eq!(disk.tags(), [TAG, "a", "b", "c", "d", "e"]);
    for (tag, _) in ancestry {
        assert_eq!(
            seen_by_qemu(&disk, Some(tag)),
            pattern::bytes(seed(tag), PLACE, LENGTH),
            "{tag}"
        );
    }
    // QEMU can go back as well, and leaves an image in order.
    tardigrade_tests::disk::qemu_img(&["snapshot", "-a", "b", &disk.file()]);
    disk.check();
    let vm = ONE.machine(std::slice::from_ref(&disk)).args(&["--loadvm", "d"]).start();
    verify(&mut vm.agent(), seed("d"));
    vm.quit();
}

#[test]
fn the_space_of_deleted_checkpoints_is_used_again() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let disk = ONE.disks(dir.path()).remove(0);
    let mut agent = vm.agent();
    let mut lengths = Vec::new();
    for round in 0..8 {
        change(&mut agent, round);
        vm.save("round", &["disk0"]);
        lengths.push(std::fs::metadata(&disk.path).unwrap().len());
        vm.delete("round", &["disk0"]);
    }
    // A checkpoint takes tens of megabytes; what may differ is a cluster of metadata here or there.
    let (early, late) = (lengths[1], lengths[7]);
    assert!(late <= early + (1 << 20), "the file grows: {lengths:?}");
    assert!(lengths[0] > 8 << 20, "{lengths:?}");
    verify(&mut agent, 7);
    vm.quit();
    assert_eq!(disk.tags(), [TAG]);
    disk.check();
}

#[test]
fn a_guest_at_work_is_saved_and_loaded_again_and_again() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = TWO.start(dir.path());
    let nodes = ["disk0", "disk1"];
    let mut agent = vm.agent();
    agent.ask("load cpu 1");
    agent.ask("load disk vda 0 32M");
    agent.ask("load disk vdb 0 32M");
    let stderr_of = vm.stderr_reader();
    let steps = |agent: &mut Agent| {
        let told = agent.fields("load status");
        assert_eq!((told["cpu"].as_str(), told["disk"].as_str()), ("1", "2"));
        let errors = (told["cpu-errors"].as_str(), told["disk-errors"].as_str());
        assert_eq!(errors, ("0", "0"), "after {told:?}; stderr:\n{}", stderr_of());
        told["disk-steps"].parse::<u64>().unwrap()
    };
    let await_steps = |agent: &mut Agent, wanted: u64| {
        while steps(agent) < wanted {}
        steps(agent)
    };
    let mut reached = await_steps(&mut agent, 4);
    for round in 0..3 {
        let tag = format!("busy{round}");
        vm.save(&tag, &nodes);
        // Far enough that a disk that was not taken back would show.
        let ahead = await_steps(&mut agent, reached + 8);
        vm.load(&tag, &nodes);
        let back = steps(&mut agent);
        assert!(back < ahead, "nothing was taken back: {back} steps after {ahead}");
        reached = await_steps(&mut agent, back + 4);
    }
    // A KVM that shadows the guest's page tables must forget those of the guest before the load,
    // or processes read each other's pages; one load in ten showed it.
    for _ in 0..20 {
        vm.load("busy1", &nodes);
        let back = steps(&mut agent);
        await_steps(&mut agent, back + 2);
    }
    vm.load("busy1", &nodes);
    let told = agent.fields("load stop");
    assert_eq!((told["cpu-errors"].as_str(), told["disk-errors"].as_str()), ("0", "0"));
    assert!(told["cpu-steps"].parse::<u64>().unwrap() > 0);
    vm.quit();
    TWO.disks(dir.path()).iter().for_each(Disk::check);
}
