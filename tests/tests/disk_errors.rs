//! Requests of a disk that fail on the host: the machine stops, and loses nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::virtio::{DATA, Driver};
use tardigrade_tests::baremetal::{Monitor, machine, monitor};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::full::Small;
use tardigrade_tests::vm::{Vm, VmSpec};
use tardigrade_tests::{pattern, require};

const PATIENCE: Duration = Duration::from_secs(120);
const SECTOR: usize = 512;

/// A disk whose first cluster is compressed, so that it can be made unreadable and whole again.
struct Fragile {
    disk: Disk,
    whole: Vec<u8>,
}

/// Where the first cluster of an image that qemu-img compresses is.
const COMPRESSED: u64 = 0x5_0000;

impl Fragile {
    fn new(dir: &Path) -> Self {
        let raw = dir.join("raw");
        std::fs::write(&raw, pattern::bytes(5, 0, 32 << 10)).unwrap();
        // Half of the cluster is zero, or it would not be compressed.
        std::fs::File::options().write(true).open(&raw).unwrap().set_len(1 << 20).unwrap();
        let path = dir.join("fragile.qcow2");
        let (raw, file) = (raw.display().to_string(), path.display().to_string());
        qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", &raw, &file]);
        let bytes = std::fs::read(&path).unwrap();
        let whole = bytes[usize::try_from(COMPRESSED).unwrap()..].to_vec();
        Self { disk: Disk { path, format: "qcow2" }, whole }
    }

    fn put(&self, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(&self.disk.path).unwrap();
        file.write_all_at(bytes, COMPRESSED).unwrap();
    }

    fn damage(&self) {
        self.put(&[0xff; 64]);
    }

    fn mend(&self) {
        self.put(&self.whole[..64]);
    }
}

fn wait(qmp: &mut Client, name: &str) -> Value {
    qmp.wait_event(PATIENCE, |event| event["event"] == name).unwrap()
}

/// Waits for STOP; gives the event of the error before it.
fn wait_stopped(vm: &Vm, qmp: &mut Client) -> Value {
    let event = wait(qmp, "BLOCK_IO_ERROR");
    assert_eq!(event["data"]["action"], "stop", "{event}");
    wait(qmp, "STOP");
    assert_eq!(vm.status(), "io-error");
    event
}

fn io_status(qmp: &mut Client) -> Value {
    qmp.execute("query-block", json!({})).unwrap()[0]["io-status"].clone()
}

fn sector(seed: u64) -> Vec<u8> {
    pattern::bytes(seed, 0, SECTOR)
}

#[test]
fn a_write_without_space_waits_until_there_is_some_and_lands() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(dir.path().join("small"), 8 << 20) else { return };
    let disk = Disk::qcow2(small.path().join("disk.qcow2"), "64M");
    let vm = machine(dir.path(), "32M", 1).disk(&disk).start();
    let mut qmp = vm.qmp();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    driver.monitor().write(DATA, &sector(1));
    assert_eq!(driver.transfer(1, 0), 0);
    small.leave(0);
    // Another cluster, for which there is no room.
    driver.monitor().write(DATA, &sector(2));
    driver.begin_transfer(1, 1024);
    let event = wait_stopped(&vm, &mut qmp);
    assert_eq!(event["data"]["nospace"], true, "{event}");
    assert_eq!(event["data"]["reason"], "No space left on device");
    assert_eq!(event["data"]["operation"], "write");
    assert_eq!(io_status(&mut qmp), "nospace");
    // For nothing: there is no space yet. The event of it may have to wait for a second.
    qmp.execute("cont", json!({})).unwrap();
    wait(&mut qmp, "STOP");
    assert_eq!((vm.status(), io_status(&mut qmp)), ("io-error".to_owned(), json!("nospace")));
    small.give_back();
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(driver.end(), 0);
    assert_eq!((vm.status(), io_status(&mut qmp)), ("running".to_owned(), json!("ok")));
    for (seed, at) in [(1, 0), (2, 1024)] {
        assert_eq!(driver.transfer(0, at), 0);
        assert_eq!(driver.monitor().bytes(DATA, SECTOR), sector(seed), "{at}");
    }
    vm.quit();
    disk.check();
    let content = disk.read(None);
    assert_eq!(content[..SECTOR], sector(1));
    assert_eq!(content[1024 * SECTOR..1025 * SECTOR], sector(2));
}

fn fragile_spec(dir: &Path, fragile: &Fragile) -> VmSpec {
    machine(dir, "32M", 1).disk_with(&fragile.disk, "", ",rerror=stop,werror=stop")
}

fn start_fragile(dir: &Path) -> (Fragile, Vm) {
    let fragile = Fragile::new(dir);
    let vm = fragile_spec(dir, &fragile).start();
    (fragile, vm)
}

#[test]
fn a_checkpoint_of_a_machine_that_an_error_stopped_has_the_request_that_waits() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fragile = Fragile::new(dir.path());
    let spec = fragile_spec(dir.path(), &fragile);
    let mut vm = spec.start();
    let mut qmp = vm.qmp();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    driver.monitor().write(DATA, &sector(77));
    fragile.damage();
    driver.begin_transfer(1, 100);
    wait_stopped(&vm, &mut qmp);
    vm.save("waits", &["disk0"]);
    assert_eq!(vm.status(), "io-error");
    fragile.mend();
    // The one that was saved goes on.
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(driver.end(), 0);
    driver.monitor().write(DATA, &[0; SECTOR]);
    assert_eq!(driver.transfer(0, 100), 0);
    assert_eq!(driver.monitor().bytes(DATA, SECTOR), sector(77));
    // So does the one that is loaded over it: it finds the error that it had.
    driver.monitor().write(DATA, &sector(78));
    assert_eq!(driver.transfer(1, 100), 0);
    fragile.damage();
    qmp.execute("stop", json!({})).unwrap();
    vm.load("waits", &["disk0"]);
    let mut qmp = vm.qmp();
    qmp.execute("cont", json!({})).unwrap();
    wait(&mut qmp, "STOP");
    assert_eq!((vm.status(), io_status(&mut qmp)), ("io-error".to_owned(), json!("failed")));
    fragile.mend();
    vm.quit();

    // And one that is started from it, which may have answered before it was saved.
    let vm = spec.args(&["--loadvm", "waits"]).start();
    let mut guest = Monitor::connect(vm.serial_path());
    guest.give_up_answers(DATA, pattern::word(77, 0));
    let mut driver = Driver::resume(&mut guest, 1);
    assert_eq!(driver.done(), 0);
    for (at, bytes) in [(100, sector(77)), (0, pattern::bytes(5, 0, SECTOR))] {
        assert_eq!(driver.transfer(0, at), 0);
        assert_eq!(driver.monitor().bytes(DATA, SECTOR), bytes, "sector {at}");
    }
    vm.quit();
    fragile.disk.check();
}

#[test]
fn a_reset_of_a_machine_that_an_error_stopped_forgets_the_request() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (fragile, vm) = start_fragile(dir.path());
    let (mut qmp, mut guest) = (vm.qmp(), monitor(&vm));
    let mut driver = Driver::start(&mut guest);
    fragile.damage();
    driver.begin_transfer(0, 0);
    let event = wait_stopped(&vm, &mut qmp);
    assert_eq!(event["data"]["operation"], "read");
    assert_eq!(event["data"]["qom-path"], "/machine/peripheral-anon/device[0]");
    qmp.execute("system_reset", json!({})).unwrap();
    // As in QEMU it shows what was until it runs.
    assert_eq!((vm.status(), io_status(&mut qmp)), ("prelaunch".to_owned(), json!("failed")));
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(io_status(&mut qmp), "ok");
    // All that was begun has ended when it stands still, and would have failed: it is damaged yet.
    qmp.execute("stop", json!({})).unwrap();
    assert_eq!((vm.status(), io_status(&mut qmp)), ("paused".to_owned(), json!("ok")));
    fragile.mend();
    vm.quit();
}

#[test]
fn a_machine_that_an_error_stopped_can_be_quit_while_a_request_waits() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (fragile, vm) = start_fragile(dir.path());
    let (mut qmp, mut guest) = (vm.qmp(), monitor(&vm));
    fragile.damage();
    Driver::start(&mut guest).begin_transfer(1, 7);
    wait_stopped(&vm, &mut qmp);
    vm.quit();
    fragile.mend();
    fragile.disk.check();
}
