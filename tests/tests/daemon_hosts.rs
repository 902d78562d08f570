//! The storage daemon among others on its host: damaged images, QEMU's locks, a kernel without
//! io_uring.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tardigrade_tests::daemon::{Daemon, have_qemu};
use tardigrade_tests::disk::{Disk, qemu_img};
use tardigrade_tests::vm::binary;

fn qemu_io(commands: &[&str], target: &[&str]) -> Output {
    let mut command = Command::new("qemu-io");
    for one in commands {
        command.args(["-c", one]);
    }
    command.args(target).output().unwrap()
}

#[track_caller]
fn assert_io(commands: &[&str], target: &[&str]) {
    let output = qemu_io(commands, target);
    assert!(output.status.success(), "{output:?}");
}

/// A node "d" of an image and its writable export of that name; gives the export's address.
fn export(daemon: &mut Daemon, image: &str) -> String {
    daemon.qmp("blockdev-add", node("d", image, false));
    let socket = daemon.path("nbd");
    daemon.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    let options = json!({"type": "nbd", "id": "e", "node-name": "d", "writable": true});
    daemon.qmp("block-export-add", options);
    format!("nbd+unix:///d?socket={}", socket.display())
}

fn node(name: &str, image: &str, read_only: bool) -> Value {
    json!({"driver": "qcow2", "node-name": name, "read-only": read_only, "discard": "unmap",
        "file": {"driver": "file", "filename": image}})
}

/// An image with data in its first two clusters; the second one's entry is not cluster aligned.
fn damaged(path: &Path) -> String {
    let disk = Disk::qcow2(path, "64M");
    assert_io(&["write -P 1 0 64k", "write -P 2 64k 64k"], &["-f", "qcow2", &disk.file()]);
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let l2 = word(word(40)) & OFFSET;
    file.write_all_at(&(word(l2 + 8) | 0x200).to_be_bytes(), l2 + 8).unwrap();
    disk.file()
}

#[test]
fn damage_found_in_use_is_told_as_qemu_tells_it_and_good_data_stays_readable() {
    if !have_qemu("a damaged image") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let told = |mut daemon: Daemon, ours: bool| -> Value {
        let image = damaged(&dir.path().join(if ours { "ours" } else { "theirs" }));
        let url = export(&mut daemon, &image);
        let bad = qemu_io(&["read 64k 4k"], &["-f", "raw", &url]);
        assert!(String::from_utf8_lossy(&bad.stdout).contains("Input/output error"), "{bad:?}");
        if ours {
            assert_io(&["read -P 1 0 64k"], &["-r", "-f", "raw", &url]);
            for command in ["write 0 4k", "write 1M 4k", "discard 0 64k"] {
                let refused = qemu_io(&[command], &["-f", "raw", &url]);
                assert!(!refused.status.success(), "{command}: {refused:?}");
            }
            // Told once, whatever comes after it.
            assert!(!qemu_io(&["read 64k 4k"], &["-f", "raw", &url]).status.success());
        }
        daemon.qmp("query-block-exports", json!({}));
        if ours {
            let nodes = daemon.qmp("query-named-block-nodes", json!({}));
            let node =
                nodes.as_array().unwrap().iter().find(|node| node["drv"] == "qcow2").unwrap();
            assert_eq!(node["ro"], true, "{node}");
            let name = node["node-name"].as_str().unwrap();
            let again = |writable: bool| json!({"type": "nbd", "id": "again", "node-name": name, "name": "again", "writable": writable});
            let error = daemon.try_qmp("block-export-add", again(true)).unwrap_err();
            assert!(error.contains("was found corrupt and takes no writes"), "{error}");
            daemon.qmp("block-export-add", again(false));
        }
        let events = daemon.events();
        let [(name, data)] = &events[..] else { panic!("{events:?}") };
        assert_eq!(name, "BLOCK_IMAGE_CORRUPTED");
        let mut data = data.clone();
        let reason = data["msg"].take();
        assert!(reason.as_str().is_some_and(|reason| reason.contains("60200")), "{reason}");
        daemon.quit();
        let info = Disk { path: image.into(), format: "qcow2" }.info();
        assert_eq!(info["format-specific"]["data"]["corrupt"], true, "{info}");
        data
    };
    let theirs = told(Daemon::start_qemu(&[]), false);
    assert_eq!(told(Daemon::start(&[]), true), theirs);
    assert_eq!(theirs["fatal"], true);
}

#[test]
fn an_image_is_written_by_one_daemon_at_a_time_ours_or_qemus() {
    if !have_qemu("locks") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = Disk::qcow2(dir.path().join("a.qcow2"), "16M").file();
    let other = Disk::qcow2(dir.path().join("over.qcow2"), "16M").file();
    qemu_img(&["rebase", "-u", "-b", &image, "-F", "qcow2", &other]);
    let mut ours = Daemon::start(&[]);
    let mut theirs = Daemon::start_qemu(&[]);
    let refused = |daemon: &mut Daemon, options: Value, lock: &str| {
        let error = daemon.try_qmp("blockdev-add", options).unwrap_err();
        assert!(error.contains(&format!("Failed to get {lock} lock")), "{error}");
    };
    let (write, shared_write) = ("\"write\"", "shared \"write\"");
    for _ in 0..2 {
        let (holder, second) = (&mut theirs, &mut ours);
        holder.qmp("blockdev-add", node("d", &image, false));
        refused(second, node("d", &image, false), write);
        refused(second, node("d", &image, true), shared_write);
        // As a backing file it may not change either.
        refused(second, node("o", &other, false), shared_write);
        holder.qmp("blockdev-del", json!({"node-name": "d"}));
        // Readers share, and keep a writer out.
        holder.qmp("blockdev-add", node("d", &image, true));
        second.qmp("blockdev-add", node("d", &image, true));
        refused(second, node("w", &image, false), write);
        second.qmp("blockdev-del", json!({"node-name": "d"}));
        refused(second, node("w", &image, false), write);
        holder.qmp("blockdev-del", json!({"node-name": "d"}));
        second.qmp("blockdev-add", node("w", &image, false));
        second.qmp("blockdev-del", json!({"node-name": "w"}));
        std::mem::swap(&mut ours, &mut theirs);
    }
    assert!(ours.quit().success() && theirs.quit().success());
}

#[test]
fn without_io_uring_threads_serve_the_data_and_the_daemon_says_so() {
    if !have_qemu("no io_uring") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("a.qcow2"), "64M");
    let mut daemon = Daemon::start_without_io_uring(&[]);
    let url = export(&mut daemon, &disk.file());
    let work =
        ["write -P 7 1M 4M", "discard 2M 64k", "write -z 3M 64k", "flush", "read -P 7 4M 1M"];
    assert_io(&work, &["-f", "raw", &url]);
    let bench = ["bench", "-q", "-f", "raw", "-w", "-c", "2000", "-d", "32", "--pattern=5"];
    qemu_img(&[&bench[..], &["-o", "8M", &url]].concat());
    let said = std::fs::read_to_string(daemon.path("stderr")).unwrap();
    assert_eq!(said.matches("io_uring cannot be used").count(), 1, "{said}");
    assert!(said.contains("Operation not permitted"), "{said}");
    assert!(daemon.quit().success());
    disk.check();
    let read = ["read -P 7 1M 1M", "read -P 0 2M 64k", "read -P 0 3M 64k", "read -P 5 8M 7M"];
    assert_io(&read, &["-f", "qcow2", &disk.file()]);
}

#[test]
fn status_and_list_work_on_a_daemon_and_what_needs_a_guest_says_so() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("r.raw"), [0; 4096]).unwrap();
    let file = dir.path().join("r.raw").display().to_string();
    let mut daemon = Daemon::start(&[]);
    let options =
        json!({"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": file}});
    daemon.qmp("blockdev-add", options);
    let addr = json!({"type": "unix", "data": {"path": daemon.path("nbd")}});
    daemon.qmp("nbd-server-start", json!({"addr": addr}));
    daemon.qmp("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "d"}));
    let qmp = daemon.path("qmp").display().to_string();
    let run = |args: &[&str]| Command::new(binary()).args(args).output().unwrap();
    let status = run(&["status", "--qmp", &qmp]);
    assert!(status.status.success(), "{status:?}");
    assert_eq!(
        String::from_utf8(status.stdout).unwrap(),
        format!("state:  storage daemon, no guest\nnode:   d writable {file}\nexport: e of d\n")
    );
    let list = run(&["snapshot", "list", "--qmp", &qmp]);
    assert!(list.status.success(), "{list:?}");
    assert_eq!(String::from_utf8(list.stdout).unwrap(), "No checkpoints.\n");
    for args in [&["save", "t"], &["load", "t"], &["delete", "t"]] {
        let refused = run(&[&["snapshot", args[0], "--qmp", &qmp], &args[1..]].concat());
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("has no guest") && said.contains("image snapshot"), "{said}");
    }
    assert!(daemon.quit().success());
}
