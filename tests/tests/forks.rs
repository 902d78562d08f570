//! Many guests from one checkpoint.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::{Monitor, machine, machine_with_disk, monitor};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::events::target;
use tardigrade_tests::faults::{Kind, Plan};
use tardigrade_tests::require;
use tardigrade_tests::vm::{VmSpec, binary};

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;

/// A fork with these options and nothing else; its overlays go to `temp`.
fn fork(checkpoint: &str, temp: &Path) -> VmSpec {
    VmSpec::bare().args(&["--fork", checkpoint]).env("TMPDIR", temp)
}

/// Bytes of guest RAM that are this process's alone, and such that it shares with others.
fn memory_of_image(pid: u32, image: &Path) -> (u64, u64) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let image = image.display().to_string();
    let (mut inside, mut private, mut shared) = (false, 0, 0);
    for line in maps.lines() {
        let kib = || line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
        if line.split_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
            inside = line.ends_with(&image);
        } else if inside && line.starts_with("Private_Dirty:") {
            private += kib();
        } else if inside
            && (line.starts_with("Shared_Clean:") || line.starts_with("Private_Clean:"))
        {
            shared += kib();
        }
    }
    (private, shared)
}

fn checksum(image: &Path) -> String {
    let output = Command::new("sha256sum").arg(image).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn forks_of_one_checkpoint_run_at_once_and_see_nothing_of_each_other() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "96M", 1)
        .args(&["--device", "virtio-rng-device", "--uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"])
        .start();
    let used = FREE..64 * MIB;
    monitor(&vm).fill(used.clone(), 1);
    vm.save("base", DISK);
    // The image goes on after the checkpoint: forks do not see that.
    monitor(&vm).fill(used.clone(), 2);
    vm.save("later", DISK);
    vm.quit();
    let before = checksum(&image);
    let checkpoint = format!("{}#base", image.display());

    let forks: Vec<_> = (0..4).map(|_| fork(&checkpoint, temp.path()).start()).collect();
    assert!(is_empty(temp.path()), "overlays have no names");
    for (n, vm) in (0..).zip(&forks) {
        let mut guest = monitor(vm);
        guest.verify(used.clone(), 1);
        // Each writes a part of its own.
        let own = FREE + n * 4 * MIB..FREE + (n * 4 + 2) * MIB;
        guest.fill(own.clone(), 10 + n);
        guest.verify(own.clone(), 10 + n);
        guest.verify_zero(70 * MIB..80 * MIB);
    }
    for (n, vm) in (0..).zip(&forks) {
        let own = FREE + n * 4 * MIB..FREE + (n * 4 + 2) * MIB;
        monitor(vm).verify(own, 10 + n);
        for other in (0..4).filter(|other| *other != n) {
            monitor(vm).verify(FREE + other * 4 * MIB..FREE + (other * 4 + 2) * MIB, 1);
        }
        let (private, shared) = memory_of_image(vm.pid(), &image);
        assert!(shared > 40 * MIB, "the rest is the page cache's: {shared}");
        assert!(private < 8 * MIB, "what was written is its own: {private}");
    }
    let uuid = |vm: &tardigrade_tests::vm::Vm| {
        vm.qmp().execute("query-uuid", json!({})).unwrap()["UUID"].as_str().unwrap().to_owned()
    };
    assert_ne!(uuid(&forks[0]), uuid(&forks[1]));
    for vm in forks {
        vm.quit();
    }
    assert_eq!(checksum(&image), before, "the base was written to");
    Disk { path: image, format: "qcow2" }.check();
}

#[test]
fn a_fork_saves_loads_and_resets_for_itself() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    let used = FREE..40 * MIB;
    monitor(&vm).fill(used.clone(), 1);
    vm.save("base", DISK);
    vm.quit();
    let before = checksum(&image);

    let mut vm = fork(&format!("{}#base", image.display()), temp.path()).start();
    let mut guest = monitor(&vm);
    guest.fill(FREE..20 * MIB, 2);
    vm.save("mine", DISK);
    guest.fill(used.clone(), 3);
    vm.load("mine", DISK);
    guest.verify(FREE..20 * MIB, 2);
    guest.verify(20 * MIB..40 * MIB, 1);
    guest.verify_zero(42 * MIB..48 * MIB);
    let listed = vm.qmp().execute("x-query-checkpoints", json!({})).unwrap();
    assert_eq!(listed[0]["checkpoint"]["tag"], "mine");
    assert_eq!(listed[0]["parent"]["tag"], "base");
    // A reset boots the kernel in memory that has nothing of the base any more.
    drop(guest);
    vm.qmp().execute("system_reset", json!({})).unwrap();
    let mut guest = monitor(&vm);
    guest.verify_zero(used);
    vm.quit();
    assert_eq!(checksum(&image), before, "the base was written to");
}

#[test]
fn a_load_in_a_fork_reads_ram_as_it_is_needed_and_leaves_nothing_of_the_base_mapped() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "96M", 1).start();
    let (own, of_base, unused) = (FREE..20 * MIB, 20 * MIB..80 * MIB, 82 * MIB..90 * MIB);
    monitor(&vm).fill(FREE..of_base.end, 1);
    vm.save("base", DISK);
    vm.quit();
    let before = checksum(&image);
    let base = format!("{}#base", image.display());

    for mode in ["lazy", "eager"] {
        let kept = dir.path().join(mode);
        let spec = VmSpec::bare().args(&["--fork", &base, "--fork-overlay"]);
        let mut vm = spec.args(&[kept.to_str().unwrap()]).supervised().start();
        let mut guest = monitor(&vm);
        guest.fill(own.clone(), 2);
        vm.save("mine", DISK);
        let (_, shared) = memory_of_image(vm.pid(), &image);
        assert!(shared > 40 * MIB, "RAM is mapped from the base: {shared}");
        // More than is put back page by page.
        guest.fill(FREE..of_base.end, 3);
        guest.fill(unused.clone(), 3);
        // The threads that read what a lazy load has left in the image.
        vm.faults().watch(Plan { threads: &["ram-"], kinds: &[Kind::Read], fault: None });
        let mut arguments = target("mine", DISK);
        arguments["x-mode"] = json!(mode);
        vm.job_with("snapshot-load", arguments).unwrap();
        assert_eq!(memory_of_image(vm.pid(), &image), (0, 0), "of the base");
        // While pages are missing, if any are.
        vm.save("again", DISK);
        let holds = |guest: &mut Monitor| {
            guest.verify(own.clone(), 2);
            guest.verify(of_base.clone(), 1);
            guest.verify_zero(unused.clone());
        };
        holds(&mut guest);
        assert_eq!(!vm.faults().end().is_empty(), mode == "lazy", "who reads");
        // It is like any other guest from now on.
        guest.fill(FREE..of_base.end, 4);
        guest.fill(unused.clone(), 4);
        vm.load("again", DISK);
        holds(&mut guest);
        guest.fill(own.clone(), 5);
        vm.load("again", DISK);
        holds(&mut guest);
        drop(guest);
        vm.qmp().execute("system_reset", json!({})).unwrap();
        let mut guest = monitor(&vm);
        guest.verify_zero(FREE..of_base.end);
        guest.fill(own.clone(), 6);
        vm.save("anew", DISK);
        guest.fill(FREE..of_base.end, 7);
        vm.load("anew", DISK);
        guest.verify(own.clone(), 6);
        guest.verify_zero(of_base.clone());
        vm.quit();
        let overlay = kept.join("disk0.qcow2");
        let check = Command::new(binary()).args(["image", "check"]).arg(&overlay).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
    assert_eq!(checksum(&image), before, "the base was written to");
}

#[test]
fn forks_of_several_disks_see_them_as_they_were_and_write_to_none() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let disks = [("a.qcow2", "16M"), ("b.qcow2", "8M")];
    let disks = disks.map(|(name, size)| Disk::qcow2(dir.path().join(name), size));
    let spec = disks.iter().fold(machine(dir.path(), "64M", 1), VmSpec::disk);
    let mut vm = spec.start();
    vm.save("base", &["disk0", "disk1"]);
    vm.quit();
    for disk in &disks {
        qemu_img_write(disk, 0x77);
    }
    let checkpoint = format!("{}#base", disks[0].file());
    let vm = fork(&checkpoint, temp.path())
        .args(&[
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", temp.path().join("nbd").display()),
        ])
        .args(&["--export", "type=nbd,id=e0,node-name=disk1"])
        .start();
    let raw = temp.path().join("raw");
    let url = format!("nbd+unix:///disk1?socket={}", temp.path().join("nbd").display());
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &url, raw.to_str().unwrap()]);
    assert!(std::fs::read(&raw).unwrap().iter().all(|byte| *byte == 0), "as it was at the save");
    // Who would write to a base is refused while a fork runs.
    let refused = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write 0 4k", &disks[1].file()])
        .stdout(Stdio::null())
        .output()
        .unwrap();
    assert!(!refused.status.success(), "the base can be written to under a fork");
    vm.quit();
}

fn qemu_img_write(disk: &Disk, byte: u8) {
    let command = format!("write -P {byte:#x} 0 1M");
    let done = Command::new("qemu-io").args(["-f", "qcow2", "-c", &command, &disk.file()]).output();
    assert!(done.unwrap().status.success());
}

#[test]
fn the_clock_of_a_fork_stands_or_goes_with_the_hosts() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    vm.save("base", DISK);
    vm.quit();
    let checkpoint = format!("{}#base", image.display());
    // A save tells the guest's clock; the guest of a paused fork has not run at all.
    let clock = |option: &str, policy: &str| {
        let spec = fork(&checkpoint, temp.path()).args(&["-S", option, policy]);
        let mut vm = spec.start();
        vm.save("mine", DISK);
        let listed = vm.qmp().execute("x-query-checkpoints", json!({})).unwrap();
        vm.quit();
        let own = &listed[0]["checkpoint"];
        own["vm-clock-sec"].as_u64().unwrap() * 1_000_000_000
            + own["vm-clock-nsec"].as_u64().unwrap()
    };
    let output = Command::new(binary())
        .args(["snapshot", "show", "--image", image.to_str().unwrap(), "base", "--output", "json"])
        .output()
        .unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let saved = shown[0]["checkpoint"].clone();
    let saved = saved["vm-clock-sec"].as_u64().unwrap() * 1_000_000_000
        + saved["vm-clock-nsec"].as_u64().unwrap();
    for option in ["--load-clock", "--fork-clock"] {
        assert_eq!(clock(option, "frozen"), saved);
        assert!(clock(option, "host") > saved);
    }
}

#[test]
fn what_cannot_be_forked_is_named() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let image = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let scratch = Disk::create(dir.path().join("scratch"), "raw", &[], "1M");
    let mut vm = machine(dir.path(), "64M", 1).disk(&image).disk(&scratch).start();
    vm.save("base", DISK);
    let checkpoint = format!("{}#base", image.file());
    let refused = |checkpoint: &str, more: &[&str]| {
        let (status, error) = fork(checkpoint, temp.path()).args(more).run();
        assert_eq!(status.code(), Some(1), "{checkpoint} {more:?}");
        assert!(is_empty(temp.path()), "overlays are left behind");
        error
    };
    assert!(refused(&checkpoint, &[]).contains("lock"), "the machine still writes to it");
    vm.quit();
    let error = refused(&checkpoint, &[]);
    assert!(error.contains("--fork ") && error.contains("disk 'disk1'"), "{error}");
    assert!(error.contains("not in the checkpoint"), "{error}");
    let error = refused(&format!("{}#none", image.file()), &[]);
    assert!(error.contains("no checkpoint 'none'; there are: base"), "{error}");
    assert!(refused("base", &[]).contains("--fork base: is not IMAGE#TAG"));
    let error = refused(&checkpoint, &["--fork-clock", "never"]);
    assert!(error.contains("--fork-clock never: must be frozen or host"), "{error}");
    let error = refused(&checkpoint, &["--load-clock", "never"]);
    assert!(error.contains("--load-clock never: must be frozen or host"), "{error}");
    let error = refused(&checkpoint, &["--load-clock", "host", "--fork-clock", "host"]);
    assert!(error.contains("--fork-clock host: is --load-clock, which is given, too"), "{error}");
    let error = refused(&checkpoint, &["--restore", &checkpoint]);
    assert!(error.contains("--fork takes it from the checkpoint"), "{error}");
}

#[test]
fn a_fork_that_keeps_its_overlays_goes_on_from_them_and_is_forked_again() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    let used = FREE..20 * MIB;
    monitor(&vm).fill(used.clone(), 1);
    vm.save("base", DISK);
    vm.quit();
    let before = checksum(&image);
    let base = format!("{}#base", image.display());
    let kept = dir.path().join("work/7");
    let options = ["--fork-overlay", kept.to_str().unwrap()];

    let mut vm = fork(&base, temp.path()).args(&options).start();
    monitor(&vm).verify(used.clone(), 1);
    monitor(&vm).fill(used.clone(), 2);
    vm.save("done", DISK);
    vm.quit();
    assert!(is_empty(temp.path()));
    assert_eq!(checksum(&image), before, "the base was written to");
    let overlay = kept.join("disk0.qcow2");
    // A second fork does not write over the first one's.
    let (status, error) = fork(&base, temp.path()).args(&options).run();
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("'disk0.qcow2': File exists"), "{error}");

    let done = format!("{}#done", overlay.display());
    for spec in [fork(&done, temp.path()), VmSpec::bare().args(&["--restore", &done])] {
        let mut vm = spec.start();
        monitor(&vm).verify(used.clone(), 2);
        vm.save("later", DISK);
        monitor(&vm).fill(used.clone(), 3);
        vm.load("later", DISK);
        monitor(&vm).verify(used.clone(), 2);
        vm.quit();
    }
    let check = Command::new(binary()).args(["image", "check"]).arg(&overlay).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let listed = Command::new(binary())
        .args(["snapshot", "list", "--image", overlay.to_str().unwrap()])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("done") && listed.contains("later"), "{listed}");

    // qemu-img works on what is in the overlay, told to leave out what is below.
    let file = json!({ "driver": "file", "filename": overlay });
    let alone = json!({ "driver": "qcow2", "file": file, "backing": null });
    let alone = format!("json:{alone}");
    assert!(qemu_img(&["snapshot", "-l", &alone]).contains(" later "));
    qemu_img(&["snapshot", "-a", "later", &alone]);
    qemu_img(&["snapshot", "-d", "later", &alone]);
    qemu_img(&["check", "-q", &alone]);
    let vm = VmSpec::bare().args(&["--restore", &done]).start();
    monitor(&vm).verify(used, 2);
    vm.quit();

    // Without the checkpoint below it an overlay is nothing, and says so.
    qemu_img(&["snapshot", "-d", "base", image.to_str().unwrap()]);
    qemu_img(&["snapshot", "-c", "other", image.to_str().unwrap()]);
    let (status, error) = VmSpec::bare().args(&["--restore", &done]).run();
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("it is the id of 'other'"), "{error}");
}

#[test]
fn a_fork_that_does_not_come_to_run_leaves_no_overlay() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk0.qcow2");
    let mut vm = machine_with_disk(dir.path(), "64M", 1).start();
    vm.save("base", DISK);
    vm.quit();
    let kept = dir.path().join("kept");
    let base = format!("{}#base", image.display());
    let args =
        ["--fork-overlay", kept.to_str().unwrap(), "--qmp", "unix:/nonexistent/qmp,server=on"];
    let (status, _) = VmSpec::bare().args(&["--fork", &base]).args(&args).run();
    assert_eq!(status.code(), Some(1));
    let (status, error) = VmSpec::bare().args(&args[..2]).args(&["--restore", &base]).run();
    assert_eq!(status.code(), Some(1));
    assert!(error.contains("needs --fork"), "{error}");
    assert!(!kept.join("disk0.qcow2").exists());
}
