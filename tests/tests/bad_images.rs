//! Images that cannot be used: refused at the start by what is wrong with them, and left as they
//! are. Images in use are refused both ways.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tardigrade_tests::counter::{self, Running};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::refusal::fails;
use tardigrade_tests::require;

/// The image must be refused with all of `wanted`, its option named, and not be changed.
fn refused(dir: &Path, image: &Path, more: &str, wanted: &[&str]) {
    let kernel = dir.join("kernel");
    fs::write(&kernel, counter::kernel(0)).unwrap();
    let before =
        fs::metadata(image).ok().filter(fs::Metadata::is_file).map(|_| fs::read(image).unwrap());
    let file = image.display().to_string();
    let node = format!("driver=qcow2,node-name=disk0,file.driver=file,file.filename={file}{more}");
    let device = "virtio-blk-device,drive=disk0";
    let kernel = kernel.display().to_string();
    let stderr =
        fails(&["--kernel", &kernel, "--serial", "null", "--blockdev", &node, "--device", device]);
    assert!(stderr.contains(&format!("--blockdev {node}: ")), "{stderr}");
    for part in wanted {
        assert!(stderr.contains(part), "'{part}' is not in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    if let Some(before) = before {
        assert!(fs::read(image).unwrap() == before, "{file} has changed");
    }
}

#[test]
fn a_file_that_is_no_image_or_has_absurd_fields_is_refused_and_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.qcow2");
    let good = Disk::qcow2(dir.path().join("good.qcow2"), "16M");
    qemu_img(&["snapshot", "-c", "s", &good.file()]);
    let good = fs::read(&good.path).unwrap();
    let table = u64::from_be_bytes(good[64..72].try_into().unwrap());
    let table = usize::try_from(table).unwrap();
    let refuse = |bytes: &[u8], wanted: &str| {
        fs::write(&path, bytes).unwrap();
        refused(dir.path(), &path, "", &[wanted, "bad.qcow2"]);
    };
    refused(dir.path(), &dir.path().join("missing"), "", &["No such file or directory"]);
    refused(dir.path(), dir.path(), "", &[]);
    refuse(b"", "Image is not in qcow2 format");
    refuse(b"plain text", "Image is not in qcow2 format");
    refuse(&[0; 65536], "Image is not in qcow2 format");
    refuse(&good[..60], "truncated");
    refuse(&good[..100], "truncated");
    refuse(&good[..65536], "truncated");
    refuse(&good[..table + 10], "end of the file");

    let u32_at = |at: usize, value: u32| (at, value.to_be_bytes().to_vec());
    let u64_at = |at: usize, value: u64| (at, value.to_be_bytes().to_vec());
    let cases = [
        (u32_at(4, 1), "version 1"),
        (u32_at(4, 4), "version 4"),
        (u32_at(20, 0), "cluster_bits is 0"),
        (u32_at(20, 8), "cluster_bits is 8"),
        (u32_at(20, 63), "cluster_bits is 63"),
        (u32_at(20, u32::MAX), "cluster_bits"),
        (u64_at(24, u64::MAX), "l1_size"),
        (u32_at(32, 1), "encrypted (AES)"),
        (u32_at(32, 2), "encrypted (LUKS)"),
        (u32_at(32, 3), "unknown encryption method 3"),
        (u32_at(36, 0), "l1_size is 0"),
        (u32_at(36, u32::MAX), "l1_size"),
        (u32_at(36, 1 << 20), "L1 table"),
        (u64_at(40, 1), "L1 table offset 0x1 is not cluster aligned"),
        (u64_at(40, 1 << 62), "L1 table"),
        (u64_at(48, 3), "refcount table offset"),
        (u64_at(48, 1 << 40), "refcount table"),
        (u32_at(56, 0), "there is no refcount table"),
        (u32_at(56, u32::MAX), "refcount table"),
        (u32_at(60, u32::MAX), "snapshots are too many"),
        (u32_at(60, 60000), "snapshot table"),
        (u64_at(64, 7), "snapshot table offset"),
        (u64_at(64, 1 << 50), "snapshot table"),
        (u64_at(72, 1 << 5), "unknown incompatible feature 5"),
        (u64_at(72, 1 << 63), "unknown incompatible feature 63"),
        (u64_at(72, 1 << 2), "'data-file' is required for this image"),
        (u64_at(72, 1 << 1), "marked as corrupt"),
        (u32_at(96, 7), "refcount_order is 7"),
        (u32_at(100, u32::MAX), "header_length"),
        (u32_at(100, 8), "header_length is 8"),
        (u64_at(8, 1 << 40), "backing file name"),
        // The snapshot's entry: the length of its strings.
        (u32_at(table + 12, u32::MAX), "end of the file"),
    ];
    for ((at, value), wanted) in cases {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(&value);
        eprintln!("at {at}: {value:02x?}");
        refuse(&bytes, wanted);
    }
}

#[test]
fn images_with_features_that_are_not_done_here_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("bad.qcow2");
    let file = image.display().to_string();
    let data = dir.path().join("data").display().to_string();
    let create = |args: &[&str]| {
        let _ = fs::remove_file(&image);
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        all.extend(args);
        all.extend([file.as_str(), "16M"]);
        qemu_img(&all);
    };
    let secret = ["--object", "secret,id=s,data=abc", "-o"];
    create(
        &[&secret[..], &["encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]].concat(),
    );
    refused(dir.path(), &image, "", &["encrypted (LUKS)"]);
    create(&[&secret[..], &["encrypt.format=aes,encrypt.key-secret=s"]].concat());
    refused(dir.path(), &image, "", &["encrypted (AES)"]);
    // A data file that is missing.
    create(&["-o", &format!("data_file={data}")]);
    fs::remove_file(&data).unwrap();
    refused(dir.path(), &image, "", &["data", "No such file or directory"]);
    // A backing file that is missing, itself, or of another format than told.
    let base = Disk::qcow2(dir.path().join("base.qcow2"), "16M");
    create(&["-F", "qcow2", "-b", &base.file()]);
    fs::rename(&base.path, dir.path().join("moved")).unwrap();
    refused(dir.path(), &image, "", &["base.qcow2", "No such file or directory"]);
    fs::write(&base.path, [0; 65536]).unwrap();
    refused(dir.path(), &image, "", &["base.qcow2", "not in qcow2 format"]);
    fs::remove_file(&base.path).unwrap();
    fs::hard_link(&image, &base.path).unwrap();
    refused(dir.path(), &image, "", &["bad.qcow2"]);
}

/// A qemu-io that has the image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn start(image: &Disk, more: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .args(more)
            .arg(&image.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is not installed");
        // Its answer tells that the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("16 MiB") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "qemu-io ended");
        }
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_in_use_is_refused_by_us_and_ours_by_qemu() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let holder = Holder::start(&disk, &[]);
    refused(dir.path(), &disk.path, "", &["Failed to get \"write\" lock", "disk0.qcow2"]);
    drop(holder);
    // A reader excludes a writer, and not another reader.
    let reader = Holder::start(&disk, &["-r"]);
    refused(dir.path(), &disk.path, "", &["lock", "disk0.qcow2"]);
    let readers = counter::spec(dir.path(), 0).disk_with(&disk, ",read-only=on", "");
    Running::start(&readers).vm.quit();
    drop(reader);

    let mut vm = Running::start(&counter::spec(dir.path(), 0).disk(&disk));
    // Two of ours.
    refused(dir.path(), &disk.path, "", &["Failed to get \"write\" lock"]);
    let file = disk.file();
    let qemu: [&[&str]; 4] = [
        &["snapshot", "-c", "t", &file],
        &["check", "-r", "all", &file],
        &["resize", &file, "32M"],
        &["info", &file],
    ];
    for args in qemu {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains("lock"), "{args:?}: {stderr}");
    }
    vm.check_alive();
    vm.vm.quit();
    disk.check();
    assert!(disk.tags().is_empty());
    qemu_img(&["snapshot", "-c", "t", &file]);
}
