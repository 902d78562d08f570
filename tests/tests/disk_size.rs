//! A disk that grows under the guest that uses it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::{Duration, Instant};

use serde_json::json;
use tardigrade_tests::agent::Agent;
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

const NODES: [&str; 1] = ["disk0"];

/// Of busy machines, and of guests whose kernel mode is interpreted.
const PATIENCE: Duration = Duration::from_secs(120);

fn resize(vm: &Vm, size: u64) {
    let arguments = json!({ "node-name": "disk0", "size": size });
    assert_eq!(vm.qmp().execute("block_resize", arguments).unwrap(), json!({}));
}

fn size(agent: &mut Agent) -> u64 {
    agent.number("size vda", "bytes")
}

/// The guest takes note by an interrupt, which comes after the command's answer.
fn wait_for_size(agent: &mut Agent, wanted: u64) {
    let end = Instant::now() + PATIENCE;
    while size(agent) != wanted {
        assert!(Instant::now() < end, "the guest sees {} bytes", size(agent));
    }
}

fn size_on_host(disk: &Disk) -> u64 {
    disk.info()["virtual-size"].as_u64().unwrap()
}

#[test]
fn the_guest_sees_and_uses_the_new_size_and_loads_go_back_to_the_old_one() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let booted = Booted { vcpus: 1, disks: 1 };
    let mut vm = booted.start(dir.path());
    let mut agent = vm.agent();
    let old = size(&mut agent);
    let new = old + (16 << 20);
    resize(&vm, new);
    wait_for_size(&mut agent, new);
    let place = format!("vda {} 64K", new - (64 << 10));
    agent.ask(&format!("pattern {place} 5"));
    agent.ask("flush vda");
    vm.save("grown", &NODES);

    // To where nobody knew of it, and forward again.
    vm.load(TAG, &NODES);
    assert_eq!(size(&mut agent), old);
    assert!(agent.try_ask(&format!("pattern {place} 6")).is_err());
    vm.load("grown", &NODES);
    assert_eq!(size(&mut agent), new);
    agent.ask("drop-caches");
    agent.ask(&format!("verify {place} 5"));
    resize(&vm, old);
    wait_for_size(&mut agent, old);
    vm.quit();

    let disks = booted.disks(dir.path());
    disks[0].check();
    assert_eq!(size_on_host(&disks[0]), old);
    let mut vm = booted.machine(&disks).args(&["--loadvm", "grown"]).start();
    let mut agent = vm.agent();
    assert_eq!(size(&mut agent), new);
    agent.ask(&format!("verify {place} 5"));
    vm.load(TAG, &NODES);
    vm.quit();
    disks[0].check();
    assert_eq!(size_on_host(&disks[0]), old);
}
