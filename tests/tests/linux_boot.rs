//! Cold boots of the Linux guest, and every way a machine's run ends or begins anew.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::agent::Agent;
use tardigrade_tests::checkpoint::Booted;
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events::story;
use tardigrade_tests::vm::{CMDLINE, Vm, VmSpec};
use tardigrade_tests::{pattern, repo, require};

/// A boot takes long where guest kernel mode is interpreted and other tests run.
const PATIENCE: Duration = Duration::from_secs(240);

fn wait_for(qmp: &mut Client, name: &str) -> Value {
    qmp.wait_event(PATIENCE, |event| event["event"] == name).unwrap()
}

/// The guest with another initramfs or command line than the other tests.
fn linux(ram: &str, vcpus: u8, initrd: &str, cmdline: &str) -> VmSpec {
    let files = ["tiny.bzImage", initrd]
        .map(|name| repo("resources/guest").join(name).display().to_string());
    let args = ["--kernel", &files[0], "--initrd", &files[1], "--append", cmdline];
    VmSpec::new(ram, vcpus).args(&args)
}

#[test]
fn one_vcpu_waits_for_cont_boots_and_powers_off_with_exit_status_0() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "64M");
    let uuid = "3b2e8a3c-1c1f-4a66-9d6e-0c9f8f8a1b2c";
    let pidfile = dir.path().join("pid");
    let mut vm = VmSpec::linux("64M", 1)
        .disk(&disk)
        .args(&["-S", "--name", "boots", "--uuid", uuid])
        .args(&["--pidfile", &pidfile.display().to_string()])
        .start();
    let mut qmp = vm.qmp();
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status, json!({ "status": "prelaunch", "running": false }));
    assert_eq!(qmp.execute("query-name", json!({})).unwrap(), json!({ "name": "boots" }));
    assert_eq!(qmp.execute("query-uuid", json!({})).unwrap(), json!({ "UUID": uuid }));
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap().trim(), vm.pid().to_string());

    let mut agent = vm.agent();
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(vm.status(), "running");
    agent.wait_ready();
    assert_eq!(agent.number("cpus", "online"), 1);
    assert_eq!(agent.ask("echo a b"), "a b");
    assert_eq!(agent.number("size vda", "bytes"), 64 << 20);

    // Left dirty in the guest: its own sync, and ours at the end, bring it to the image.
    agent.ask("pattern vda 1M 64K 7");
    agent.ask("poweroff");
    let shutdown = wait_for(&mut qmp, "SHUTDOWN");
    assert_eq!(shutdown["data"], json!({ "guest": true, "reason": "guest-shutdown" }));
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.stderr());
    assert!(!vm.qmp_path().exists() && !vm.serial_path().exists() && !pidfile.exists());
    disk.check();
    assert_eq!(disk.read(None)[1 << 20..][..64 << 10], pattern::bytes(7, 1 << 20, 64 << 10));
}

#[test]
fn a_reset_of_the_guest_or_of_a_client_boots_again() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let booted = Booted { vcpus: 2, disks: 2 };
    // From a checkpoint: what is booted then is the command line's kernel, not what was saved.
    let vm = booted.start(dir.path());
    let mut qmp = vm.qmp();
    let by_client = json!({ "guest": false, "reason": "host-qmp-system-reset" });
    let mut agent = vm.agent();
    agent.ask("dirty 1 5");
    let before = agent.number("clock", "monotonic");
    agent.ask("reboot");
    let reset = wait_for(&mut qmp, "RESET");
    assert_eq!(reset["data"], json!({ "guest": true, "reason": "guest-reset" }));
    assert_eq!(vm.status(), "running");
    // The guest runs throughout; then again, of a stopped guest, which stays stopped.
    assert_eq!(story(&qmp.take_events(), ""), [""; 0]);

    qmp.execute("stop", json!({})).unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    assert_eq!(wait_for(&mut qmp, "RESET")["data"], by_client);
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status, json!({ "status": "prelaunch", "running": false }));
    qmp.execute("cont", json!({})).unwrap();

    // And once more in the middle of the boot.
    qmp.execute("system_reset", json!({})).unwrap();
    assert_eq!(wait_for(&mut qmp, "RESET")["data"], by_client);
    agent.wait_ready();
    assert_eq!(agent.number("cpus", "online"), 2);
    // A new life: nothing is left of the memory of the old one.
    assert_eq!(agent.try_ask("check-memory"), Err("state: nothing dirtied yet".to_owned()));
    assert_ne!(agent.number("clock", "monotonic"), before);
    vm.quit();
    booted.disks(dir.path()).iter().for_each(Disk::check);
}

/// qcow2 with two queues, raw, and a read-only image, in one boot.
#[test]
fn two_vcpus_use_disks_of_every_kind_and_no_reboot_ends_the_machine() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "64M");
    let raw = Disk::create(dir.path().join("disk1.raw"), "raw", &[], "16M");
    let read_only = Disk { path: dir.path().join("disk2.raw"), format: "raw" };
    std::fs::write(&read_only.path, pattern::bytes(30, 0, 4 << 20)).unwrap();
    let mut vm = linux("64M", 2, "initramfs.cpio", CMDLINE)
        .disk_with(&disk, ",discard=unmap", ",num-queues=2")
        .disk(&raw)
        .disk_with(&read_only, ",read-only=on", "")
        .args(&["--device", "virtio-rng-device", "--no-reboot"])
        .start();
    let mut qmp = vm.qmp();
    let mut agent = vm.agent();
    agent.wait_ready();
    check_identities(&vm, &mut agent);
    write_and_read_disks(&mut agent);

    // The agent's reboot unmounts, the kernel's flushes.
    agent.ask("reboot");
    let shutdown = wait_for(&mut qmp, "SHUTDOWN");
    assert_eq!(shutdown["data"], json!({ "guest": true, "reason": "guest-reset" }));
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.stderr());

    check_disks(&disk, &raw, &read_only);
}

/// vCPUs and disks are what was asked for, on the host and as the guest's kernel sees them.
fn check_identities(vm: &Vm, agent: &mut Agent) {
    let cpus = agent.fields("cpus");
    assert_eq!((cpus["online"].as_str(), cpus["mask"].as_str()), ("2", "0x3"));
    let threads = vm.qmp().execute("query-cpus-fast", json!({})).unwrap();
    let threads = threads.as_array().unwrap().iter().map(|cpu| cpu["thread-id"].as_u64().unwrap());
    for (index, thread) in threads.enumerate() {
        let name = std::fs::read_to_string(format!("/proc/{}/task/{thread}/comm", vm.pid()));
        assert!(name.unwrap().contains(&index.to_string()));
    }
    assert_ne!(agent.ask("rng 16"), agent.ask("rng 16"));

    // The kind and the identity of each disk, as the guest's kernel sees them. The agent mounts
    // sysfs when it first runs a program.
    assert_eq!(agent.number("exec true", "status"), 0);
    assert_eq!(agent.ask("read-text /sys/block/vda/serial"), "disk0");
    assert_eq!(agent.ask("read-text /sys/block/vdc/serial"), "disk2");
    assert_eq!(agent.ask("read-text /sys/block/vda/ro"), "0");
    assert_eq!(agent.ask("read-text /sys/block/vdc/ro"), "1");
    let queues =
        ["0", "1"].map(|queue| agent.ask(&format!("read-text /sys/block/vda/mq/{queue}/cpu_list")));
    assert_eq!(queues, ["0", "1"], "each vCPU has a queue of its own");
}

/// Bytes from where, and how many, are written to each disk: across cluster borders too.
const PIECES: [(usize, usize); 4] =
    [(512, 512), (65_024, 1024), (1 << 20, 1 << 20), (5 << 20, 192 << 10)];

fn write_and_read_disks(agent: &mut Agent) {
    // Written in pieces from 512 bytes to 1 MiB, some across cluster borders, each read back.
    for (offset, length) in PIECES {
        for device in ["vda", "vdb"] {
            agent.ask(&format!("pattern {device} {offset} {length} 9"));
            agent.ask(&format!("verify {device} {offset} {length} 9"));
        }
    }
    let zeroes = pattern::sum(&[0; 64 << 10]);
    agent.ask("discard vda 1M 64K");
    agent.ask("zero vda 1216K 64K");
    agent.ask("zero vdb 1216K 64K");
    for (device, offset) in [("vda", "1M"), ("vda", "1216K"), ("vdb", "1216K"), ("vda", "40M")] {
        assert_eq!(
            agent.fields(&format!("sum {device} {offset} 64K"))["sum"],
            zeroes,
            "{device} {offset}"
        );
    }
    agent.ask("verify vda 1280K 64K 9");
    // Without `discard=unmap` a discard does nothing, as in QEMU.
    agent.ask("discard vdb 1M 64K");
    agent.ask("verify vdb 1M 64K 9");
    // A read-only disk reads, and refuses to be written.
    agent.ask("verify vdc 0 1M 30");
    assert!(agent.try_ask("pattern vdc 0 64K 31").is_err());
    agent.ask("verify vdc 0 64K 30");
    // Two writers at once, on both vCPUs.
    agent.ask("load disk vda 16M 8M");
    agent.ask("load disk vda 24M 8M");
    while agent.number("load status", "disk-steps") < 8 {}
    assert_eq!(agent.number("load stop", "disk-errors"), 0);
    agent.ask("mkfs vdb");
    agent.ask("mount vdb");
    agent.ask("write-file /mnt/file 30000 4");
}

/// The images have what [`write_and_read_disks`] wrote.
fn check_disks(disk: &Disk, raw: &Disk, read_only: &Disk) {
    disk.check();
    let mut expected = vec![0; 64 << 20];
    for (offset, length) in PIECES {
        expected[offset..][..length].copy_from_slice(&pattern::bytes(9, offset as u64, length));
    }
    expected[1 << 20..][..64 << 10].fill(0);
    expected[1216 << 10..][..64 << 10].fill(0);
    let seen = disk.read(None);
    let written = 16 << 20..32 << 20;
    assert!(seen[..written.start] == expected[..written.start], "QEMU reads another disk");
    assert!(seen[written].iter().any(|byte| *byte != 0));
    assert_eq!(std::fs::read(&read_only.path).unwrap(), pattern::bytes(30, 0, 4 << 20));
    // The magic number of ext4, and the file's first words somewhere on it.
    let ext4 = std::fs::read(&raw.path).unwrap();
    assert_eq!(ext4[0x438..0x43a], [0x53, 0xef]);
    let start = pattern::bytes(4, 0, 64);
    assert!(ext4.chunks(1024).any(|block| block.starts_with(&start)), "the file is not there");
}

/// RAM on both sides of the hole below 4 GiB, used by the guest, carried by a checkpoint.
#[test]
fn memory_above_4_gib_is_used_and_comes_back() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    // Setting up gigabytes of `struct page` takes minutes where guest kernel mode is interpreted.
    // So the guest is told to use only the lowest 128 MiB, and the 128 MiB above 4 GiB, which
    // Linux gives to processes first; and to make no bounce buffers for devices.
    let cmdline = format!("{CMDLINE} memmap=2944M$128M swiotlb=noforce");
    let mut vm = linux("3200M", 1, "agent.cpio", &cmdline).disk(&disk).start();
    let mut agent = vm.agent();
    agent.wait_ready();
    agent.ask("dirty 2 11");
    vm.save("large", &["disk0"]);
    agent.ask("dirty 2 12");
    vm.load("large", &["disk0"]);
    assert_eq!(agent.number("check-memory", "seed"), 11);
    vm.quit();
    disk.check();
}
