//! Lazy loads: the guest runs while its memory is still in the image, and whatever is done
//! meanwhile is done to the guest of the checkpoint.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::virtio::{DATA, Driver};
use tardigrade_tests::baremetal::{Monitor, Routine, machine, machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events::target;
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec};
use tardigrade_tests::vmstate::VmState;

const DISK: &[&str] = &["disk0"];
const MIB: u64 = 1 << 20;
const USED: Range<u64> = FREE..128 * MIB;
const PATIENCE: Duration = Duration::from_secs(120);

/// A machine whose memory is filled with 1 in checkpoint "one" and with 2 now.
fn filled(dir: &Path) -> (VmSpec, Vm, Monitor) {
    let spec = machine_with_disk(dir, "160M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    guest.fill(USED, 1);
    vm.save("one", DISK);
    guest.fill(USED, 2);
    (spec, vm, guest)
}

fn disk(dir: &Path) -> Disk {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }
}

fn missing(vm: &Vm) -> Value {
    vm.qmp().execute("x-query-load", json!({})).unwrap()
}

/// Waits until all of memory is read.
fn wait_whole(vm: &Vm) {
    let mut qmp = vm.qmp();
    let deadline = std::time::Instant::now() + PATIENCE;
    while qmp.execute("x-query-load", json!({})).unwrap()["missing"] != 0 {
        assert!(std::time::Instant::now() < deadline, "memory is not read");
        std::thread::yield_now();
    }
}

#[test]
fn the_rest_of_memory_is_read_in_the_background() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (spec, mut vm, mut guest) = filled(dir.path());
    vm.load("one", DISK);
    wait_whole(&vm);
    guest.verify(USED, 1);
    vm.quit();
    let vm = spec.args(&["--loadvm", "one"]).start();
    wait_whole(&vm);
    let mut guest = monitor(&vm);
    guest.verify(USED, 1);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn an_eager_load_leaves_nothing_to_be_read() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (spec, mut vm, mut guest) = filled(dir.path());
    let mut arguments = target("one", DISK);
    arguments["x-mode"] = json!("eager");
    vm.job_with("snapshot-load", arguments).unwrap();
    assert_eq!(missing(&vm)["missing"], 0);
    guest.verify(USED, 1);
    vm.quit();
    let vm = spec.args(&["--loadvm", "one", "--load-mode", "eager"]).start();
    assert_eq!(missing(&vm)["missing"], 0);
    monitor(&vm).verify(USED, 1);
    vm.quit();
}

#[test]
fn a_host_that_refuses_userfaultfd_loads_eagerly_and_says_so() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "160M", 1).without_userfaultfd();
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    guest.fill(USED, 1);
    vm.save("one", DISK);
    guest.fill(USED, 2);
    assert!(!vm.stderr().contains("userfaultfd"), "{}", vm.stderr());
    vm.load("one", DISK);
    assert_eq!(missing(&vm)["missing"], 0);
    let told = vm.stderr();
    assert!(told.contains("RAM is read before the guest runs"), "{told}");
    guest.verify(USED, 1);
    // It goes on like any other.
    guest.fill(USED, 3);
    vm.save("two", DISK);
    vm.load("one", DISK);
    vm.load("two", DISK);
    guest.verify(USED, 3);
    vm.quit();
    let vm = spec.args(&["--loadvm", "one"]).start();
    assert_eq!(missing(&vm)["missing"], 0);
    assert!(vm.stderr().contains("RAM is read before the guest runs"), "{}", vm.stderr());
    monitor(&vm).verify(USED, 1);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn a_save_right_after_a_load_saves_what_was_loaded() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, mut vm, mut guest) = filled(dir.path());
    vm.load("one", DISK);
    vm.save("two", DISK);
    guest.fill(USED, 3);
    vm.load("two", DISK);
    guest.verify(USED, 1);
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn a_save_right_after_a_load_waits_for_nobody_with_clusters_larger_than_what_is_read_at_once() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.qcow2");
    let disk = Disk::create(path, "qcow2", &["cluster_size=2M"], "16M");
    let mut vm = machine(dir.path(), "160M", 1).disk(&disk).start();
    let mut guest = monitor(&vm);
    guest.fill(USED, 1);
    vm.save("one", DISK);
    for round in 0..8 {
        guest.fill(USED, 2);
        vm.load("one", DISK);
        // Pages that are not zero, in clusters of which nothing else is there yet.
        for place in (USED.start + 16 * MIB * round..USED.end).step_by(9 << 20).take(4) {
            guest.fill(place..place + 4096, 3);
        }
        let tag = round.to_string();
        vm.save(&tag, DISK);
        vm.load(&tag, DISK);
        vm.delete(&tag, DISK);
    }
    vm.load("one", DISK);
    guest.verify(USED, 1);
    vm.quit();
    disk.check();
}

#[test]
fn a_guest_is_reset_while_a_job_reads_the_rest_of_its_memory() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (spec, vm, _) = filled(dir.path());
    vm.quit();
    // All of memory is saved then, so all of it is read before.
    let spec = spec.args(&["--machine", "microvm,dirty-tracking=off", "--loadvm", "one"]);
    for (command, tag) in [("snapshot-save", "two"), ("snapshot-delete", "one")] {
        let mut vm = spec.start();
        let mut qmp = vm.qmp();
        std::thread::scope(|scope| {
            let job = scope.spawn(|| vm.job(command, tag, DISK));
            // Before it begins there would be nothing to be read any more.
            while !job.is_finished() && qmp.execute("query-jobs", json!({})).unwrap() == json!([]) {
            }
            while !job.is_finished() {
                qmp.execute("system_reset", json!({})).unwrap();
            }
            job.join().unwrap().unwrap();
        });
        qmp.execute("system_reset", json!({})).unwrap();
        monitor(&vm).verify_zero(USED);
        vm.quit();
    }
    assert_eq!(disk(dir.path()).tags(), ["two"]);
    disk(dir.path()).check();
}

#[test]
fn a_load_right_after_a_load_is_of_the_second_checkpoint() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, mut vm, mut guest) = filled(dir.path());
    vm.save("two", DISK);
    for _ in 0..3 {
        vm.load("one", DISK);
        vm.load("two", DISK);
        guest.verify(64 * MIB..USED.end, 2);
        vm.load("one", DISK);
        guest.verify(64 * MIB..USED.end, 1);
    }
    vm.quit();
    disk(dir.path()).check();
}

#[test]
fn a_checkpoint_can_be_deleted_right_after_its_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, mut vm, mut guest) = filled(dir.path());
    vm.load("one", DISK);
    vm.delete("one", DISK);
    guest.verify(USED, 1);
    assert_eq!(missing(&vm)["missing"], 0);
    vm.quit();
    assert!(disk(dir.path()).tags().is_empty());
    disk(dir.path()).check();
}

#[test]
fn a_guest_is_stopped_continued_reset_and_ended_right_after_a_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (spec, mut vm, mut guest) = filled(dir.path());
    let mut qmp = vm.qmp();
    vm.load("one", DISK);
    for _ in 0..5 {
        qmp.execute("stop", json!({})).unwrap();
        assert_eq!(vm.status(), "paused");
        qmp.execute("cont", json!({})).unwrap();
    }
    guest.verify(USED, 1);
    vm.load("one", DISK);
    qmp.execute("system_reset", json!({})).unwrap();
    guest.wait_started();
    guest.verify_zero(USED);
    vm.load("one", DISK);
    vm.quit();
    disk(dir.path()).check();
    spec.clone().args(&["--loadvm", "one"]).start().quit();
    // Paused from the start, with all of memory read meanwhile.
    let vm = spec.args(&["--loadvm", "one", "-S"]).start();
    wait_whole(&vm);
    assert_eq!(vm.status(), "prelaunch");
    vm.quit();
}

#[test]
fn a_disk_is_written_from_memory_that_is_still_in_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = machine_with_disk(dir.path(), "64M", 1);
    let mut vm = spec.start();
    let mut guest = monitor(&vm);
    guest.fill(DATA..DATA + 512, 7);
    guest.fill(FREE..48 * MIB, 1);
    drop(guest);
    vm.save("one", DISK);
    for round in 0..10 {
        vm.load("one", DISK);
        let mut guest = Monitor::connect(vm.serial_path());
        // The driver's rings, the header and the data lie in memory that is not read yet.
        assert_eq!(Driver::start(&mut guest).transfer(1, round), 0);
        guest.write(DATA, &[0; 512]);
        assert_eq!(Driver::start(&mut guest).transfer(0, round), 0);
        guest.verify(DATA..DATA + 512, 7);
    }
    vm.quit();
    disk(dir.path()).check();
}

/// The checkpoint "one" in an image where a part of memory cannot be read, until it is mended.
struct Damaged {
    spec: VmSpec,
    image: PathBuf,
    /// Where the compressed form of the cluster is to be.
    place: u64,
    contents: Vec<u8>,
}

const CLUSTER: u64 = 64 << 10;
/// In the middle of a cluster.
const BAD: u64 = 100 * MIB + 0x8000;

impl Damaged {
    fn new(dir: &Path) -> Self {
        let (spec, vm, _) = filled(dir);
        vm.quit();
        let image = disk(dir).path;
        let state = VmState::open(&image);
        let header = state.read(24, 8);
        let ram = u64::from_le_bytes(header.try_into().unwrap());
        let at = (ram + BAD) / CLUSTER * CLUSTER;
        let contents = state.read(at, usize::try_from(CLUSTER).unwrap());
        // Far behind all that the program may want to allocate meanwhile.
        let place = File::open(&image).unwrap().metadata().unwrap().len() + (64 << 20);
        let place = place.next_multiple_of(CLUSTER);
        let mut damaged = Self { spec, image, place, contents };
        // Compressed (bit 62), 255 more sectors from bit 54: see qcow2's "compressed cluster".
        state.map(at, 1 << 62 | 255 << 54 | damaged.place);
        // What is made to look damaged has no count either: nothing may be built upon it.
        let untracked = damaged.spec.args(&["--machine", "microvm,dirty-tracking=off"]);
        damaged.spec = untracked.args(&["--loadvm", "one"]);
        damaged
    }

    fn put(&self, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.image).unwrap();
        file.write_all_at(bytes, self.place).unwrap();
    }

    /// The contents in deflate's stored blocks (RFC 1951, 3.2.4).
    fn mend(&self) {
        let (first, last) = self.contents.split_at(1 << 15);
        let block = |last: u8, bytes: &[u8]| {
            let length = u16::try_from(bytes.len()).unwrap();
            let mut block = vec![last];
            block.extend(length.to_le_bytes());
            block.extend((!length).to_le_bytes());
            block.extend(bytes);
            block
        };
        self.put(&[block(0, first), block(1, last)].concat());
    }

    /// Starts the machine, and lets the guest touch the bad memory, at CPL 0 or 3.
    fn touched(&self, user: bool) -> (Vm, Client, Monitor) {
        // No cluster of the image is there, so a load may have cut it off.
        self.put(&[0xff; 2 << 16]);
        let vm = self.spec.start();
        let mut qmp = vm.qmp();
        let mut guest = monitor(&vm);
        if user {
            guest.start(Routine::User, &[Routine::Verify as u64, BAD, BAD + 4096, 1]);
        } else {
            guest.start(Routine::Peek64, &[BAD]);
        }
        wait_stopped(&mut qmp);
        assert_eq!(vm.status(), "io-error");
        (vm, qmp, guest)
    }
}

/// Waits for the events of memory that cannot be read.
fn wait_stopped(qmp: &mut Client) {
    let mut wait = |name: &str| qmp.wait_event(PATIENCE, |event| event["event"] == name).unwrap();
    let event = wait("BLOCK_IO_ERROR");
    assert_eq!(event["data"]["node-name"], "disk0");
    assert_eq!(event["data"]["operation"], "read");
    assert_eq!(event["data"]["action"], "stop");
    wait("STOP");
}

#[test]
fn memory_that_cannot_be_read_stops_the_guest_until_it_can() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    for user in [false, true] {
        let (mut vm, mut qmp, mut guest) = damaged.touched(user);
        let told = missing(&vm);
        assert_eq!((&told["tag"], &told["node-name"]), (&json!("one"), &json!("disk0")));
        assert!(told["error"].is_string() && told["missing"] != 0, "{told}");
        // There is no guest to save.
        let error = vm.job("snapshot-save", "two", DISK).unwrap_err();
        assert!(error.contains("RAM of snapshot 'one' could not be read from 'disk0'"), "{error}");
        qmp.execute("stop", json!({})).unwrap();
        assert_eq!(vm.status(), "io-error");
        // Tried again for nothing.
        qmp.execute("cont", json!({})).unwrap();
        wait_stopped(&mut qmp);
        assert_eq!(vm.status(), "io-error");

        damaged.mend();
        qmp.execute("cont", json!({})).unwrap();
        let answer = guest.answer().unwrap();
        assert_eq!(vm.status(), "running");
        if user {
            assert_eq!(answer, 0, "wrong at {answer:#x}");
        }
        guest.verify(USED, 1);
        wait_whole(&vm);
        vm.save("two", DISK);
        vm.delete("two", DISK);
        vm.quit();
    }
}

#[test]
fn a_guest_whose_memory_cannot_be_read_is_saved_once_it_can() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    let (mut vm, mut qmp, mut guest) = damaged.touched(false);
    damaged.mend();
    vm.save("two", DISK);
    assert_eq!(vm.status(), "io-error");
    qmp.execute("cont", json!({})).unwrap();
    guest.answer().unwrap();
    guest.fill(USED, 2);
    vm.load("two", DISK);
    // The guest of the checkpoint answers what it was asked then.
    guest.answer().unwrap();
    guest.verify(USED, 1);
    vm.quit();
}

#[test]
fn a_guest_whose_memory_cannot_be_read_can_be_reset_loaded_and_ended() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    for user in [false, true] {
        let (vm, mut qmp, mut guest) = damaged.touched(user);
        qmp.execute("system_reset", json!({})).unwrap();
        qmp.execute("cont", json!({})).unwrap();
        guest.wait_started();
        guest.verify_zero(USED);
        vm.quit();

        let (mut vm, mut qmp, mut guest) = damaged.touched(user);
        vm.load("one", DISK);
        qmp.execute("cont", json!({})).unwrap();
        guest.verify(FREE..BAD / CLUSTER * CLUSTER, 1);
        vm.quit();

        let (vm, _, _) = damaged.touched(user);
        vm.quit();
    }
}

#[test]
fn a_fork_reads_what_it_cannot_map_when_it_is_touched() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    damaged.put(&[0xff; 2 << 16]);
    let checkpoint = format!("{}#one", damaged.image.display());
    let fork = VmSpec::bare().args(&["--fork", &checkpoint]).env("TMPDIR", dir.path());
    let (status, stderr) = fork.clone().args(&["--load-mode", "eager"]).run();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("RAM of snapshot 'one' could not be read"), "{stderr}");

    let mut vm = fork.start();
    let (mut qmp, mut guest) = (vm.qmp(), monitor(&vm));
    let before_and_behind =
        [FREE..BAD / CLUSTER * CLUSTER, BAD.next_multiple_of(CLUSTER)..USED.end];
    before_and_behind.into_iter().for_each(|range| guest.verify(range, 1));
    // All else is mapped.
    assert_eq!(missing(&vm)["missing"], CLUSTER);
    guest.start(Routine::User, &[Routine::Verify as u64, BAD, BAD + 4096, 1]);
    let error = |event: &Value| event["event"] == "BLOCK_IO_ERROR";
    assert_eq!(qmp.wait_event(PATIENCE, error).unwrap()["data"]["operation"], "read");
    qmp.wait_event(PATIENCE, |event| event["event"] == "STOP").unwrap();
    assert_eq!(vm.status(), "io-error");
    let error = vm.job("snapshot-save", "two", DISK).unwrap_err();
    assert!(error.contains("RAM of snapshot 'one' could not be read"), "{error}");

    damaged.mend();
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(guest.answer().unwrap(), 0);
    guest.verify(USED, 1);
    wait_whole(&vm);
    // It goes on like any other.
    guest.fill(BAD - MIB..BAD + MIB, 2);
    vm.save("two", DISK);
    guest.fill(USED, 3);
    vm.load("two", DISK);
    guest.verify(FREE..BAD - MIB, 1);
    guest.verify(BAD - MIB..BAD + MIB, 2);
    vm.quit();
}

#[test]
fn a_fork_whose_memory_cannot_be_read_can_be_reset_and_ended() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    damaged.put(&[0xff; 2 << 16]);
    let checkpoint = format!("{}#one", damaged.image.display());
    let fork = VmSpec::bare().args(&["--fork", &checkpoint]).env("TMPDIR", dir.path());
    for reset in [true, false] {
        let vm = fork.start();
        let (mut qmp, mut guest) = (vm.qmp(), monitor(&vm));
        guest.start(Routine::Peek64, &[BAD]);
        qmp.wait_event(PATIENCE, |event| event["event"] == "STOP").unwrap();
        if reset {
            qmp.execute("system_reset", json!({})).unwrap();
            qmp.execute("cont", json!({})).unwrap();
            guest.wait_started();
            guest.verify_zero(USED);
        }
        vm.quit();
    }
}

#[test]
fn an_eager_load_of_what_cannot_be_read_is_refused() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let damaged = Damaged::new(dir.path());
    damaged.put(&[0xff; 2 << 16]);
    let (status, stderr) = damaged.spec.clone().args(&["--load-mode", "eager"]).run();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("--loadvm one: RAM of snapshot 'one' could not be read"), "{stderr}");
    let (status, stderr) = damaged.spec.args(&["--load-mode", "slow"]).run();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("--load-mode slow: must be lazy or eager"), "{stderr}");
}
