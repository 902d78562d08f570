//! Images in block devices, which keep their length and what they held: loop devices.

use std::path::{Path, PathBuf};

use crate::{have_qemu_img, ok, ours, refused, run};

const MIB: u64 = 1 << 20;

/// A loop device over a file that is full of old data; gone when dropped.
struct Device {
    name: String,
    file: PathBuf,
}

impl Device {
    /// `None`, saying so, where none can be had.
    fn new(dir: &Path, megabytes: usize) -> Option<Self> {
        let file = dir.join("device");
        std::fs::write(&file, vec![0xa5; megabytes << 20]).unwrap();
        let made = std::process::Command::new("losetup").args(["-f", "--show"]).arg(&file).output();
        match made {
            Ok(made) if made.status.success() => {
                let name = String::from_utf8(made.stdout).unwrap().trim().to_owned();
                Some(Self { name, file })
            }
            other => {
                eprintln!("SKIPPED: no loop device (root, and losetup, are needed): {other:?}");
                None
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.name]).status();
    }
}

#[test]
fn a_qcow2_image_is_made_in_a_device_over_what_was_there() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let Some(device) = Device::new(dir, 40) else { return };
    let name = device.name.as_str();
    ok(&ours(dir, &["create", "-q", "zero.raw", "32M"]));
    for options in [
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=falloc,extended_l2=on",
        "preallocation=full,cluster_size=4k",
    ] {
        // Once over bytes without a meaning, then over an image.
        for _ in 0..2 {
            ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-o", options, name, "32M"]));
            ok(&run(dir, "qemu-img", &["check", "-q", "-f", "qcow2", name]));
            ok(&ours(dir, &["check", "-q", name]));
            let compare = ["compare", "-q", "-f", "raw", "-F", "qcow2", "zero.raw", name];
            ok(&run(dir, "qemu-img", &compare));
            ok(&run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 3 100k 3M", name]));
            ok(&run(dir, "qemu-io", &["-f", "qcow2", "-c", "read -P 0 0 100k", name]));
        }
        assert!(ok(&ours(dir, &["info", name])).contains("virtual size: 32 MiB"));
        std::fs::write(&device.file, vec![0xa5; 40 << 20]).unwrap();
    }
    let args = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", name, "64M"];
    let error = refused(&ours(dir, &args));
    assert!(error.contains("use a larger device"), "{error}");
    assert!(ok(&ours(dir, &["info", name])).contains("file format: raw"), "it was left alone");
}

#[test]
fn copies_into_a_device_show_nothing_of_what_was_there() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let Some(device) = Device::new(dir, 24) else { return };
    let name = device.name.as_str();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "16M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 5 1M 2M", "-c", "write -P 6 15M 1M", "a.q"]));
    for (format, flags) in [("raw", &[][..]), ("qcow2", &[]), ("qcow2", &["-c"]), ("raw", &["-n"])]
    {
        std::fs::write(&device.file, vec![0xa5; 24 << 20]).unwrap();
        ok(&ours(dir, &[&["convert", "-O", format], flags, &["a.q", name]].concat()));
        // What a raw device has past the source's end is as it was.
        let read = ["convert", "-q", "-f", format, "-O", "raw", name, "copy"];
        ok(&run(dir, "qemu-img", &read));
        let length = 16 * MIB;
        std::fs::File::options()
            .write(true)
            .open(dir.join("copy"))
            .unwrap()
            .set_len(length)
            .unwrap();
        ok(&run(dir, "qemu-img", &["compare", "-F", "raw", "a.q", "copy"]));
    }
}

#[test]
fn a_device_is_not_resized_and_the_image_in_it_is() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let Some(device) = Device::new(dir, 8) else { return };
    let name = device.name.as_str();
    for args in [&["16M"][..], &["--shrink", "4M"]] {
        let error = refused(&ours(dir, &[&["resize", "-f", "raw", name], args].concat()));
        assert!(error.contains("Cannot resize device files"), "{error}");
    }
    ok(&ours(dir, &["resize", "-q", "-f", "raw", name, "8M"]));
    let info = ok(&ours(dir, &["info", "-f", "raw", name]));
    assert!(info.contains("virtual size: 8 MiB") && info.contains("file length: 8 MiB"), "{info}");
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", name, "4M"]));
    ok(&ours(dir, &["resize", "-q", name, "1G"]));
    assert!(ok(&ours(dir, &["info", name])).contains("virtual size: 1 GiB"));
    ok(&run(dir, "qemu-img", &["check", "-q", "-f", "qcow2", name]));
}

#[test]
fn a_qcow2_image_made_over_a_file_has_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("old"), vec![0xa5; 1 << 20]).unwrap();
    // Of a regular file, nothing of what was there is left.
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "old", "4M"]));
    ok(&ours(dir, &["convert", "-O", "raw", "old", "copy"]));
    assert!(std::fs::read(dir.join("copy")).unwrap() == vec![0; 4 << 20]);
}
