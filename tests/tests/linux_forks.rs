//! The Linux guest revived from an image alone, and forked: each is the guest that was saved, and goes
//! on by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::collections::HashSet;
use std::path::Path;

use tardigrade_tests::agent::Agent;
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;
use tardigrade_tests::vm::VmSpec;

const TWO: Booted = Booted { vcpus: 2, disks: 2 };
const NODES: &[&str] = &["disk0", "disk1"];

/// A guest with state 1 in memory, on a disk and in a file that is in its page cache only, saved as
/// "used". Gives the image's checkpoint.
fn used(dir: &Path) -> String {
    let mut vm = TWO.start(dir);
    let mut agent = vm.agent();
    agent.ask("mkfs vdb");
    agent.ask("mount vdb");
    change(&mut agent, 1);
    vm.save("used", NODES);
    change(&mut agent, 2);
    agent.ask("sync");
    vm.quit();
    format!("{}#used", dir.join("disk0.qcow2").display())
}

fn change(agent: &mut Agent, seed: u64) {
    agent.ask(&format!("dirty 1 {seed}"));
    agent.ask(&format!("pattern vda 1M 256K {seed}"));
    agent.ask(&format!("write-file /mnt/file 50000 {seed}"));
}

fn verify(agent: &mut Agent, seed: u64) {
    assert_eq!(agent.number("check-memory", "seed"), seed);
    agent.ask(&format!("verify vda 1M 256K {seed}"));
    agent.ask(&format!("verify-file /mnt/file {seed}"));
}

/// The file system is whole, and the guest's processors both work.
fn is_well(agent: &mut Agent) {
    agent.ask("umount");
    agent.ask("mount vdb");
    assert_eq!(agent.number("cpus", "online"), 2);
    agent.ask("load cpu 2");
    assert_eq!(agent.number("load stop", "cpu-errors"), 0);
}

#[test]
fn forks_of_a_linux_guest_go_on_apart_and_draw_other_random_numbers() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = used(dir.path());
    let fork = VmSpec::bare().args(&["--fork", &checkpoint]).env("TMPDIR", temp.path());
    let mut forks = [fork.start(), fork.start()];
    let mut agents = forks.each_ref().map(|vm| vm.agent());
    let mut drawn = HashSet::new();
    for (seed, agent) in (10..).zip(&mut agents) {
        // What the guest's driver had drawn ahead when it was saved is in its memory, the same in all.
        agent.ask("rng 256");
        assert!(drawn.insert(agent.ask("rng 64")), "two forks draw the same random numbers");
        verify(agent, 1);
        change(agent, seed);
        is_well(agent);
    }
    for (seed, agent) in (10..).zip(&mut agents) {
        verify(agent, seed);
    }
    // A fork has checkpoints of its own.
    forks[0].save("mine", NODES);
    change(&mut agents[0], 20);
    forks[0].load("mine", NODES);
    verify(&mut agents[0], 10);
    verify(&mut agents[1], 11);
    drop(agents);
    forks.into_iter().for_each(|vm| vm.quit());
    let disks = TWO.disks(dir.path());
    assert!(disks.iter().all(|disk| disk.tags() == [TAG, "used"]), "the base was changed");
    disks.iter().for_each(Disk::check);
}

#[test]
fn a_linux_guest_is_revived_from_its_image_alone_and_can_reboot() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = used(dir.path());
    let mut vm = VmSpec::bare().args(&["--restore", &checkpoint]).start();
    let mut agent = vm.agent();
    verify(&mut agent, 1);
    is_well(&mut agent);
    change(&mut agent, 3);
    vm.save("later", NODES);
    vm.load("used", NODES);
    verify(&mut agent, 1);
    vm.load("later", NODES);
    verify(&mut agent, 3);
    // The kernel is the recorded one.
    agent.ask("sync");
    agent.ask("reboot");
    agent.wait_ready();
    agent.ask("verify vda 1M 256K 3");
    agent.ask("mount vdb");
    agent.ask("verify-file /mnt/file 3");
    drop(agent);
    vm.quit();
    TWO.disks(dir.path()).iter().for_each(Disk::check);
}
