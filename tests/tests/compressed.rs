//! Checkpoints that are compressed in the image: the same guest comes back, on every way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tardigrade_tests::baremetal::chains::Chains;
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::{Monitor, machine, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events;
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec, binary};

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;
/// Pages of memory that a chain counts in. They are alike, and shrink to next to nothing.
const CHAINS: Chains = Chains { pages: 3000 };

fn disk(dir: &Path) -> Disk {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }
}

/// A machine whose disk compresses with zstd.
fn zstd_machine(dir: &Path, vcpus: u8) -> VmSpec {
    let path = dir.join("disk0.qcow2");
    let disk = Disk::create(path, "qcow2", &["compression_type=zstd"], "16M");
    machine(dir, "64M", vcpus).disk(&disk)
}

/// Starts a save; gives what is told of the job in the end, its error included.
fn save(vm: &Vm, tag: &str, compress: &str, then: impl FnOnce()) -> Value {
    let mut qmp = vm.qmp();
    let mut arguments = events::target(tag, DISK);
    arguments["job-id"] = json!(tag);
    arguments["x-compress"] = json!(compress);
    qmp.execute("snapshot-save", arguments).unwrap();
    then();
    qmp.wait_event(Duration::from_secs(120), |event| {
        event["data"]["id"] == tag && event["data"]["status"] == "concluded"
    })
    .unwrap();
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == tag).unwrap().clone();
    qmp.execute("job-dismiss", json!({ "id": tag })).unwrap();
    job
}

/// A save that works.
fn saved(vm: &Vm, tag: &str, compress: &str) -> u64 {
    let job = save(vm, tag, compress, || ());
    assert_eq!(job["error"], Value::Null, "{}", vm.stderr());
    job["x-bytes-written"].as_u64().unwrap()
}

#[test]
fn compressed_checkpoints_of_a_guest_that_writes_all_the_time_are_one_instant_each() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = zstd_machine(dir.path(), 3);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    let tags: Vec<String> = (0..6).map(|n| format!("t{n}")).collect();
    for (n, tag) in tags.iter().enumerate() {
        saved(&vm, tag, if n == 2 { "none" } else { "zstd" });
        CHAINS.go_on(&mut guest);
    }
    for n in [3, 0, 5, 1, 2, 4] {
        // The second load of each is a rewind.
        for _ in 0..2 {
            vm.load(&tags[n], DISK);
            CHAINS.go_on(&mut guest);
        }
        let branch = format!("{}-branch", tags[n]);
        saved(&vm, &branch, if n % 2 == 0 { "zstd" } else { "none" });
        vm.delete(&tags[n], DISK);
        vm.load(&branch, DISK);
        CHAINS.go_on(&mut guest);
    }
    CHAINS.stop(&mut guest);
    vm.quit();
    disk(dir.path()).check();
    for mode in ["lazy", "eager"] {
        let vm = spec.clone().args(&["--loadvm", "t4-branch", "--load-mode", mode]).start();
        let mut guest = Monitor::connect(vm.serial_path());
        CHAINS.go_on(&mut guest);
        CHAINS.stop(&mut guest);
        vm.quit();
    }
    disk(dir.path()).check();
}

#[test]
fn forks_of_a_compressed_checkpoint_have_its_memory() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = zstd_machine(dir.path(), 1).start();
    let mut guest = monitor(&vm);
    // Noise, which is stored as it is, and a byte of each page, which is not.
    let noise = FREE..4 * MIB;
    guest.fill(noise.clone(), 1);
    for page in (30 * MIB..34 * MIB).step_by(4096) {
        guest.poke(page, page);
    }
    let written = saved(&vm, "base", "zstd");
    assert!(written < 4 * MIB, "{written} bytes are not compressed");
    vm.quit();
    let checkpoint = format!("{}#base", dir.path().join("disk0.qcow2").display());
    let fork = |mode| VmSpec::bare().args(&["--fork", &checkpoint, "--load-mode", mode]).start();
    let forks = ["lazy", "eager"].map(fork);
    for (n, vm) in (2..).zip(&forks) {
        let mut guest = monitor(vm);
        guest.verify(noise.clone(), 1);
        for page in (30 * MIB..34 * MIB).step_by(4096) {
            assert_eq!(guest.peek(page), page);
        }
        guest.verify_zero(34 * MIB..60 * MIB);
        guest.fill(30 * MIB..38 * MIB, n);
    }
    for (n, vm) in (2..).zip(forks) {
        monitor(&vm).verify(30 * MIB..38 * MIB, n);
        vm.quit();
    }
    disk(dir.path()).check();
}

#[test]
fn a_compressed_save_that_is_cancelled_or_killed_leaves_the_checkpoints_before_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = zstd_machine(dir.path(), 3);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    CHAINS.start(&mut guest);
    saved(&vm, "first", "zstd");
    let mut cancelled = 0;
    for n in 0..6 {
        let tag = format!("c{n}");
        CHAINS.go_on(&mut guest);
        let job = save(&vm, &tag, "zstd", || {
            // It may be over already.
            let _ = vm.qmp().execute("job-cancel", json!({ "id": tag }));
        });
        if job["error"] == "Operation canceled" {
            cancelled += 1;
        }
    }
    assert!(cancelled > 0);
    vm.load("first", DISK);
    CHAINS.go_on(&mut guest);
    drop(guest);
    vm.save("second", DISK);
    save_and_kill(vm);
    let disk = disk(dir.path());
    // What the killed save had taken is leaked; nothing else is wrong.
    let file = disk.file();
    let check = Command::new("qemu-img").args(["check", "-q", "-r", "leaks", &file]).status();
    assert!(check.unwrap().success());
    disk.check();
    for tag in ["first", "second"] {
        let vm = spec.clone().args(&["--loadvm", tag]).start();
        let mut guest = Monitor::connect(vm.serial_path());
        CHAINS.go_on(&mut guest);
        CHAINS.stop(&mut guest);
        vm.quit();
    }
    disk.check();
}

/// Kills the machine when a save has begun to write.
fn save_and_kill(mut vm: Vm) {
    let mut qmp = vm.qmp();
    let mut arguments = events::target("killed", DISK);
    arguments["job-id"] = json!("killed");
    arguments["x-compress"] = json!("zstd");
    qmp.execute("snapshot-save", arguments).unwrap();
    loop {
        let jobs = qmp.execute("query-jobs", json!({})).unwrap();
        let job =
            jobs.as_array().unwrap().iter().find(|job| job["id"] == "killed").unwrap().clone();
        if job["current-progress"].as_u64().unwrap() > 0 {
            break;
        }
    }
    vm.signal(libc::SIGKILL);
    vm.wait();
}

#[test]
fn the_shell_compresses_by_the_method_of_the_image_and_says_which_it_is() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = zstd_machine(dir.path(), 1).start();
    let qmp = vm.qmp_path().display().to_string();
    let save = |method: &str| {
        let args = ["snapshot", "save", "--qmp", &qmp, "--compress", method, "mine"];
        let output = Command::new(binary()).args(args).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (good, error) = save("zlib");
    assert!(!good);
    let why = "compresses with zstd, not with zlib: ask for zstd";
    assert!(error.contains(why), "{error}");
    let (good, error) = save("lzma");
    assert!(!good && error.contains("lzma") && error.contains("zstd"), "{error}");
    let (good, error) = save("zstd");
    assert!(good, "{error}");
    vm.quit();
    let disk = disk(dir.path());
    disk.check();
    assert_eq!(disk.tags(), ["mine"]);
}
