//! Bare-metal guests: an NBD export of a disk that a guest is writing to.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use std::process::{Child, Command, Stdio};

use tardigrade_tests::baremetal::virtio::{DATA, Driver};
use tardigrade_tests::baremetal::{machine, monitor};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::{pattern, refusal, require};

const SECTOR: usize = 512;
const SECTORS: usize = 256;

fn copy(url: &str, to: &str) -> Child {
    Command::new("nbdcopy").args([url, to]).stdin(Stdio::null()).spawn().unwrap()
}

fn sector(number: usize) -> Vec<u8> {
    pattern::bytes(number as u64, 0, SECTOR)
}

#[test]
fn a_disk_is_copied_over_nbd_while_its_guest_writes() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let socket = path("nbd");
    let vm = machine(dir.path(), "32M", 1)
        .disk(&disk)
        .args(&["--nbd-server", &format!("addr.type=unix,addr.path={socket}")])
        .args(&["--export", "type=nbd,id=e,node-name=disk0,name=disk"])
        .start();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    let url = format!("nbd+unix:///disk?socket={socket}");

    let mut copier = copy(&url, &path("during"));
    let mut copies = 0;
    let mut check_copy = |copier: &mut Child| {
        assert!(copier.wait().unwrap().success());
        let bytes = std::fs::read(path("during")).unwrap();
        assert_eq!(bytes.len(), 16 << 20);
        // A sector is there or is not: never a part of it.
        for (number, found) in bytes.chunks(SECTOR).take(SECTORS).enumerate() {
            assert!(found == sector(number) || found == [0; SECTOR], "sector {number} is torn");
        }
        copies += 1;
    };
    for number in 0..SECTORS {
        driver.monitor().write(DATA, &sector(number));
        assert_eq!(driver.transfer(1, number as u64), 0, "sector {number}");
        if copier.try_wait().unwrap().is_some() {
            check_copy(&mut copier);
            copier = copy(&url, &path("during"));
        }
    }
    check_copy(&mut copier);
    assert!(copies > 0);

    // What the guest has written is what readers see, flushed or not.
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &url, &path("after")]);
    let bytes = std::fs::read(path("after")).unwrap();
    for (number, found) in bytes.chunks(SECTOR).take(SECTORS).enumerate() {
        assert!(found == sector(number), "sector {number}");
    }
    // The export is for readers only.
    let write = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &url]).output();
    assert!(!write.unwrap().status.success());
    driver.prove_it_works(7);
    vm.quit();
    disk.check();
}

#[test]
fn an_export_writes_to_a_guests_disk_only_if_the_device_shares_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let socket = dir.path().join("nbd").display().to_string();
    let server = format!("addr.type=unix,addr.path={socket}");
    let export = ["--nbd-server", &server, "--export", "type=nbd,id=e,node-name=disk0,writable=on"];
    let refused = machine(dir.path(), "32M", 1).disk(&disk).args(&export);
    let refused = refused.args(&["--serial", "null"]);
    let arguments: Vec<&str> = refused.arguments().iter().map(String::as_str).collect();
    let said = refusal::fails(&arguments);
    assert!(said.contains("Permission conflict on node 'disk0'"), "{said}");

    let vm = machine(dir.path(), "32M", 1).disk_with(&disk, "", ",share-rw=on").args(&export);
    let vm = vm.start();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    let url = format!("nbd+unix:///disk0?socket={socket}");
    let args = ["-f", "raw", "-c", "write -P 9 512 512", &url];
    assert!(Command::new("qemu-io").args(args).stdout(Stdio::null()).status().unwrap().success());
    assert_eq!(driver.transfer(0, 1), 0);
    assert_eq!(driver.monitor().bytes(DATA, SECTOR), [9; SECTOR]);
    vm.quit();
    disk.check();
}
