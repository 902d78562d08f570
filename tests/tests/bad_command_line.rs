//! Options and files that cannot be used: exit status 1, and one line on stderr that names the
//! option, its value, and what is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use tardigrade_tests::counter;
use tardigrade_tests::disk::Disk;
use tardigrade_tests::refusal::fails;
use tardigrade_tests::{repo, require};

/// Runs with `args`: it must end with exit status 1 and all of `wanted` on stderr.
fn refused(args: &[&str], wanted: &[&str]) {
    let stderr = fails(args);
    for part in wanted {
        assert!(stderr.contains(part), "{args:?}: '{part}' is not in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
}

#[test]
fn every_option_with_a_bad_value_is_named_with_the_value() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, counter::kernel(0)).unwrap();
    let kernel = kernel.display().to_string();
    let long = "s".repeat(21);
    let blk = format!("virtio-blk-device,drive=d,serial={long}");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--machine", "q35"], &["--machine q35: ", "microvm"]),
        (&["--machine", "microvm,pit=off"], &["--machine microvm,pit=off: "]),
        (&["--accel", "tcg"], &["--accel tcg: ", "kvm"]),
        (&["--cpu", "qemu64"], &["--cpu qemu64: ", "host"]),
        (&["--smp", "0"], &["--smp 0: "]),
        (&["--smp", "255"], &["--smp 255: ", "254"]),
        (&["--smp", "two"], &["--smp two: "]),
        (&["-m", "0"], &["-m 0: "]),
        (&["-m", "31M"], &["-m 31M: ", "32 MiB"]),
        (&["-m", "much"], &["-m much: "]),
        (&["-m", "99999999T"], &["-m 99999999T: "]),
        (&["-m", "33554433B"], &["-m 33554433B: ", "4 KiB"]),
        (&["--append", "caf\u{e9}"], &["--append: ", "ASCII"]),
        (&["--initrd", "/nonexistent/initrd"], &["--initrd /nonexistent/initrd: "]),
        (&["--blockdev", "driver=qcow3,node-name=d"], &["--blockdev driver=qcow3", "qcow3"]),
        (&["--blockdev", "node-name=d"], &["--blockdev node-name=d: ", "driver"]),
        (
            &["--blockdev", "driver=raw,node-name=d,file.driver=file"],
            &["--blockdev driver=raw", "filename"],
        ),
        (
            &["--blockdev", "driver=raw,driver=qcow2"],
            &["--blockdev driver=raw", "Parameter 'file' is missing"],
        ),
        (&["--blockdev", "{\"driver\":"], &["--blockdev {\"driver\":: "]),
        (
            &["--blockdev", "driver=raw,node-name=d,file.driver=file,file.filename=/dev/null,zz=1"],
            &["--blockdev driver=raw", "Parameter 'zz' is unexpected"],
        ),
        (&["--device", "e1000"], &["--device e1000: "]),
        (&["--device", "virtio-blk-device"], &["--device virtio-blk-device: ", "drive"]),
        (
            &["--device", "virtio-blk-device,drive=nowhere"],
            &["--device virtio-blk-device,drive=nowhere: ", "nowhere"],
        ),
        (&["--device", &blk], &["--device virtio-blk-device", &long, "20"]),
        (&["--device", "virtio-blk-device,drive=d,num-queues=17"], &["num-queues '17'", "16"]),
        (&["--device", "virtio-rng-device,x=1"], &["--device virtio-rng-device,x=1: ", "'x'"]),
        (&["--qmp", "udp:localhost:1"], &["--qmp udp:localhost:1: ", "unix:"]),
        (&["--qmp", "tcp:localhost:1"], &["--qmp tcp:localhost:1: ", "cannot connect"]),
        (
            &["--qmp", "unix:/nonexistent/qmp,server=on,wait=off"],
            &["--qmp unix:/nonexistent/qmp,server=on,wait=off: "],
        ),
        (&["--qmp", "unix:/tmp/x,server=on,wait=maybe"], &["--qmp unix:/tmp/x", "wait"]),
        (&["--serial", "tty"], &["--serial tty: "]),
        (&["--serial", "file:/nonexistent/log"], &["--serial file:/nonexistent/log: "]),
        (&["--loadvm", "t"], &["--loadvm t: "]),
        (&["--uuid", "1-2-3"], &["--uuid 1-2-3: "]),
        (&["--pidfile", "/nonexistent/pid"], &["--pidfile /nonexistent/pid: "]),
    ];
    for (args, wanted) in cases {
        let needs_kvm =
            args.iter().any(|arg| ["--append", "--initrd", "--loadvm", "-m"].contains(arg));
        if needs_kvm && !require::kvm() {
            continue;
        }
        let mut all = vec!["--kernel", kernel.as_str()];
        all.extend(*args);
        if !args.contains(&"--serial") {
            all.extend(["--serial", "null"]);
        }
        refused(&all, wanted);
    }
    refused(&["--serial", "null"], &["--kernel", "missing"]);
    refused(&["--serial", "null", "--loadvm", "t", "--initrd", "i"], &["--initrd i: ", "--kernel"]);
    refused(&["--no-such-option"], &["--no-such-option"]);
    refused(&["word"], &["word"]);
    refused(&["--smp"], &["--smp"]);
}

fn kernel_refused(path: &Path, wanted: &str) {
    let file = path.display().to_string();
    refused(&["--serial", "null", "--kernel", &file], &["--kernel", &file, wanted]);
}

#[test]
fn a_file_that_is_no_kernel_is_refused_by_what_is_wrong_with_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let linux = std::fs::read(repo("resources/guest/tiny.bzImage")).unwrap();
    let elf = counter::kernel(1 << 20);
    kernel_refused(&dir.path().join("missing"), "No such file or directory");
    kernel_refused(dir.path(), "not a regular file");
    kernel_refused(Path::new("/dev/zero"), "not a regular file");
    kernel_refused(&file("empty", b""), "empty");
    kernel_refused(&file("text", b"#!/bin/sh\necho no kernel\n"), "not an ELF or bzImage kernel");
    kernel_refused(&file("zeroes", &[0; 1 << 20]), "not an ELF or bzImage kernel");
    // Cut off at every interesting place.
    for length in [600, 1000, 0x2000, linux.len() / 2, linux.len() / 4 * 3] {
        kernel_refused(&file("bzImage", &linux[..length]), "kernel");
    }
    for length in [20, 100, 150, 0x1000, elf.len() - 1] {
        kernel_refused(&file("elf", &elf[..length]), "truncated");
    }
    // A payload with a byte turned over is caught by the decompressor or the ELF checks.
    let mut damaged = linux.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0x5a);
    kernel_refused(&file("damaged", &damaged), "payload");
    let with = |at: usize, bytes: &[u8]| {
        let mut elf = elf.clone();
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        file("elf", &elf)
    };
    kernel_refused(&with(4, &[1]), "64-bit");
    kernel_refused(&with(18, &[183, 0]), "machine 183");
    kernel_refused(&with(16, &[1, 0]), "not an executable");
    kernel_refused(&with(56, &[0xff, 0xff]), "65535 program headers");
    kernel_refused(&with(56, &[0, 0]), "no segment");
    kernel_refused(&with(24, &[0, 0, 0, 0]), "entry point 0x0");
    // A segment over all of memory, past its end, and on the boot structures.
    kernel_refused(&with(64 + 40, &[0xff; 8]), "segment 0");
    kernel_refused(&with(64 + 24, &[0, 0, 0x20, 0]), "entry point 0x100000");
    kernel_refused(&with(64 + 56 + 24, &[0, 0, 0, 0]), "segment 1 at 0x0");
    kernel_refused(&with(64 + 40, &(1u64 << 32).to_le_bytes()), "segment 0");

    let kernel = file("good", &elf).display().to_string();
    let empty = file("initrd", b"").display().to_string();
    let wanted = ["--initrd", empty.as_str(), "empty"];
    refused(&["--serial", "null", "--kernel", &kernel, "--initrd", &empty], &wanted);
    let large = file("large", &[]);
    std::fs::File::options().write(true).open(&large).unwrap().set_len(1 << 40).unwrap();
    let large = large.display().to_string();
    refused(&["--serial", "null", "--kernel", &kernel, "--initrd", &large], &["initrd"]);
}

#[test]
fn a_tag_that_is_not_there_ends_the_program_and_leaves_the_image_alone() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let raw = Disk::create(dir.path().join("raw"), "raw", &[], "1M");
    let text = |spec: &tardigrade_tests::vm::VmSpec| {
        let args: Vec<_> = spec.arguments().iter().map(String::as_str).collect();
        fails(&[&args[..], &["--serial", "null", "--loadvm", "nope"]].concat())
    };
    let before = std::fs::read(&disk.path).unwrap();
    let stderr = text(&counter::spec(dir.path(), 0).disk(&disk));
    let wanted = "--loadvm nope: Snapshot 'nope' does not exist in one or more devices";
    assert!(stderr.contains(wanted), "{stderr}");
    let stderr = text(&counter::spec(dir.path(), 0).disk_with(&disk, ",read-only=on", ""));
    assert!(stderr.contains("--loadvm nope: the machine has no writable disk"), "{stderr}");
    let stderr = text(&counter::spec(dir.path(), 0).disk(&disk).disk(&raw));
    assert!(
        stderr.contains("Device 'disk1' is writable but does not support snapshots"),
        "{stderr}"
    );
    assert!(std::fs::read(&disk.path).unwrap() == before, "the image has changed");
    disk.check();
}
