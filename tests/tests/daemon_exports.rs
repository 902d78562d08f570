//! The storage daemon and its clients: images served over NBD, and a clean end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;
use std::process::Command;

use serde_json::json;
use tardigrade_tests::daemon::{Daemon, have_qemu};
use tardigrade_tests::refusal;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}{error}");
    said
}

fn create(dir: &Path, name: &str, more: &[&str]) -> String {
    let path = dir.join(name).display().to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(more);
    args.extend([path.as_str(), "64M"]);
    run("qemu-img", &args);
    path
}

#[test]
fn an_image_is_written_over_nbd_and_whole_after_sigterm() {
    if !have_qemu("nbd and sigterm") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", &[]);
    let socket = dir.path().join("nbd").display().to_string();
    let pidfile = dir.path().join("pid");
    let daemon = Daemon::start(&[
        "--blockdev",
        &format!("driver=qcow2,node-name=d,file.driver=file,file.filename={image}"),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={socket},max-connections=4"),
        "--export",
        "type=nbd,id=e,node-name=d,name=disk,writable=on",
        "--pidfile",
        pidfile.to_str().unwrap(),
    ]);
    assert!(pidfile.exists());
    let url = format!("nbd+unix:///disk?socket={socket}");
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 2M", "-c", "write -z 2M 64k", &url]);
    let status = daemon.signal(libc::SIGTERM);
    assert!(status.success(), "{status}");
    assert!(!pidfile.exists() && !Path::new(&socket).exists());
    run("qemu-img", &["check", "-f", "qcow2", &image]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 7 1M 1M", "-c", "read -P 0 2M 64k", &image]);
}

#[test]
fn exports_come_and_go_over_qmp_with_events() {
    if !have_qemu("exports") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", &[]);
    let mut daemon = Daemon::start(&[]);
    daemon.qmp(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": image}}),
    );
    daemon.qmp("block-dirty-bitmap-add", json!({"node": "d", "name": "b"}));
    let socket = daemon.path("nbd");
    let addr = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    daemon.qmp("nbd-server-start", addr);
    for (id, name) in [("e", "x"), ("f", "y")] {
        daemon.qmp("block-export-add", json!({"type": "nbd", "id": id, "node-name": "d", "name": name, "writable": true, "bitmaps": ["b"]}));
        if id == "e" {
            // A bitmap belongs to one export.
            daemon.qmp("block-export-del", json!({"id": "e"}));
            assert_eq!(daemon.events(), [("BLOCK_EXPORT_DELETED".to_owned(), json!({"id": "e"}))]);
        }
    }
    let listed = daemon.qmp("query-block-exports", json!({}));
    assert_eq!(
        listed,
        json!([{"id": "f", "type": "nbd", "node-name": "d", "shutting-down": false}])
    );
    let url = format!("nbd+unix:///y?socket={}", socket.display());
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 64k", &url]);
    let map = run(
        "qemu-img",
        &[
            "map",
            "--output=json",
            "--image-opts",
            &format!(
                "driver=nbd,export=y,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:b",
                socket.display()
            ),
        ],
    );
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    // The map shows what is dirty as holes.
    let dirty: Vec<_> = map.as_array().unwrap().iter().filter(|e| e["data"] == false).collect();
    assert_eq!(dirty.len(), 1, "{map}");
    assert_eq!((&dirty[0]["start"], &dirty[0]["length"]), (&json!(1 << 20), &json!(65536)));
    assert_eq!(
        daemon.try_qmp("blockdev-del", json!({"node-name": "d"})),
        Err("Node d is in use".to_owned())
    );
    daemon.qmp("nbd-server-stop", json!({}));
    assert_eq!(daemon.events(), [("BLOCK_EXPORT_DELETED".to_owned(), json!({"id": "f"}))]);
    daemon.qmp("block_resize", json!({"node-name": "d", "size": 96 << 20}));
    daemon.qmp("blockdev-del", json!({"node-name": "d"}));
    assert_eq!(daemon.qmp("query-named-block-nodes", json!({})), json!([]));
    assert!(run("qemu-img", &["info", "--output=json", &image]).contains("100663296"));
    assert!(daemon.quit().success());
    run("qemu-img", &["check", "-f", "qcow2", &image]);
}

#[test]
fn a_node_is_reopened_under_a_client_that_writes() {
    if !have_qemu("reopen under a client") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", &[]);
    let mut daemon = Daemon::start(&[]);
    let options = |no_flush: bool| json!({"driver": "qcow2", "node-name": "d", "cache": {"no-flush": no_flush}, "file": {"driver": "file", "filename": image}});
    daemon.qmp("blockdev-add", options(false));
    let socket = daemon.path("nbd");
    daemon.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    daemon.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "d", "writable": true}),
    );
    let url = format!("nbd+unix:///d?socket={}", socket.display());
    let mut client = Command::new("qemu-img")
        .args([
            "bench",
            "-f",
            "raw",
            "-w",
            "-c",
            "20000",
            "-d",
            "16",
            "-s",
            "4096",
            "--pattern=5",
            &url,
        ])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut round = 0;
    while client.try_wait().unwrap().is_none() {
        daemon.qmp("blockdev-reopen", json!({"options": [options(round % 2 == 0)]}));
        round += 1;
    }
    assert!(client.wait().unwrap().success());
    assert!(round > 1, "the client was too fast for a reopen");
    let mut read_only = options(false);
    read_only["read-only"] = json!(true);
    assert_eq!(
        daemon.try_qmp("blockdev-reopen", json!({"options": [read_only]})),
        Err("Read-only block node 'd' cannot support read-write users".to_owned())
    );
    assert!(daemon.quit().success());
    run("qemu-img", &["check", "-f", "qcow2", &image]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 5 0 64M", &image]);
}

#[test]
fn options_of_a_guest_are_refused_by_name() {
    for (args, option) in [
        (&["--kernel", "k"][..], "--kernel k"),
        (&["-m", "1G"], "-m 1G"),
        (&["--smp", "2"], "--smp 2"),
        (&["--device", "virtio-rng-device"], "--device virtio-rng-device"),
        (&["--serial", "null"], "--serial null"),
        (&["-S"], "-S"),
        (&["--loadvm", "t"], "--loadvm t"),
    ] {
        let all: Vec<&str> = ["--machine", "none"].iter().chain(args).copied().collect();
        let said = refusal::fails(&all);
        assert!(said.contains(&format!("{option}: there is no guest")), "{said}");
    }
    let said = refusal::fails(&["--machine", "none", "--export", "type=nbd,id=e,node-name=d"]);
    assert!(said.contains("needs --nbd-server"), "{said}");
}
