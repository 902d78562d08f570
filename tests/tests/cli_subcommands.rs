//! `tardigrade snapshot`, `status`, `demo`: what people run.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tardigrade_tests::baremetal::{machine_with_disk, monitor};
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::cli::{fail, succeed};
use tardigrade_tests::tap::tapped;
use tardigrade_tests::vm::binary;
use tardigrade_tests::{repo, require};

#[test]
fn a_checkpoint_is_saved_listed_loaded_and_deleted_from_the_shell() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let booted = Booted { vcpus: 1, disks: 2 };
    let vm = booted.start(dir.path());
    let qmp = vm.qmp_path().display().to_string();
    let snapshot = |verb: &str, tag: &str| succeed(&["snapshot", verb, "--qmp", &qmp, tag]);
    let list = || succeed(&["snapshot", "list", "--qmp", &qmp]);

    let mut agent = vm.agent();
    agent.ask("pattern vda 0 64K 1");
    assert!(snapshot("save", "mine").starts_with("'mine' saved in "));
    let listed = list();
    let rows: Vec<_> = listed.lines().skip(1).collect();
    assert!(rows[0].starts_with(&format!("● {TAG} ")), "{listed}");
    assert!(rows[1].starts_with("○ mine  <- "), "its parent is the one before: {listed}");
    assert!(rows[1].ends_with("disk0, disk1"), "{listed}");

    agent.ask("pattern vda 0 64K 2");
    assert!(snapshot("load", "mine").starts_with("'mine' loaded in "));
    agent.ask("verify vda 0 64K 1");
    assert!(snapshot("delete", "mine").starts_with("'mine' deleted in "));
    assert!(!list().contains("mine"));

    let error = fail(&["snapshot", "delete", "--qmp", &qmp, "mine"]);
    assert!(error.contains("no disk has a checkpoint 'mine'"), "{error}");
    assert!(fail(&["snapshot", "save", "--qmp", &qmp, ""]).contains("must not be empty"));
    let error = fail(&["snapshot", "load", "--qmp", &qmp, "mine"]);
    assert!(error.contains("Snapshot 'mine' does not exist in one or more devices"), "{error}");
    vm.quit();
    booted.disks(dir.path()).iter().for_each(tardigrade_tests::disk::Disk::check);
}

#[test]
fn options_of_saves_and_loads_are_those_of_the_command_that_is_sent() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with_disk(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    // What the command has besides the checkpoint and its place.
    let sent = |verb: &str, tag: &str, options: &[&str]| {
        let ((), commands) = tapped(&vm, |qmp| {
            let qmp = qmp.display().to_string();
            let mut args = vec!["snapshot", verb, "--qmp", &qmp, tag];
            args.extend_from_slice(options);
            succeed(&args);
        });
        let name = format!("snapshot-{verb}");
        let of_job = |command: &&Value| command["execute"] == json!(name);
        let mut arguments = commands.iter().find(of_job).unwrap()["arguments"].clone();
        for usual in ["job-id", "tag", "vmstate", "devices"] {
            assert!(arguments.as_object_mut().unwrap().remove(usual).is_some(), "{commands:?}");
        }
        arguments
    };
    assert_eq!(sent("save", "a", &[]), json!({}));
    assert_eq!(sent("save", "b", &["--mode", "live"]), json!({ "x-mode": "live" }));
    let both = json!({ "x-mode": "stop", "x-description": "still" });
    assert_eq!(sent("save", "c", &["--mode", "stop", "--description", "still"]), both);
    assert_eq!(sent("load", "a", &[]), json!({}));
    assert_eq!(sent("load", "b", &["--mode", "lazy"]), json!({ "x-mode": "lazy" }));
    assert_eq!(sent("load", "c", &["--mode", "eager"]), json!({ "x-mode": "eager" }));
    let clock = json!({ "x-mode": "eager", "x-clock": "host" });
    assert_eq!(sent("load", "c", &["--mode", "eager", "--clock", "host"]), clock);
    let missing = vm.qmp().execute("x-query-load", json!({})).unwrap();
    assert_eq!(missing["missing"], 0, "all of memory was read");
    // The guest is the one that was loaded last, and goes on.
    guest.tsc();
    vm.quit();
}

#[test]
fn status_tells_state_disks_and_name() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let booted = Booted { vcpus: 1, disks: 2 };
    let pidfile = dir.path().join("pid");
    let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    let vm = booted
        .spec(dir.path())
        .args(&["--loadvm", TAG, "-S", "--name", "water bear", "--uuid", uuid])
        .args(&["--pidfile", &pidfile.display().to_string()])
        .start();
    let status = succeed(&["status", "--qmp", &vm.qmp_path().display().to_string()]);
    for wanted in ["water bear", "prelaunch", "disk0 writable", "disk1 writable"] {
        assert!(status.contains(wanted), "'{wanted}' is missing:\n{status}");
    }
    let pid = std::fs::read_to_string(&pidfile).unwrap();
    assert_eq!(pid.trim(), vm.pid().to_string());
    let told = vm.qmp().execute("query-uuid", serde_json::json!({})).unwrap();
    assert_eq!(told["UUID"], uuid);
    vm.quit();
    assert!(!pidfile.exists(), "the pid file is left behind");
}

#[test]
fn a_subcommand_names_the_socket_that_nobody_listens_on() {
    let error = fail(&["status", "--qmp", "/nonexistent/vm.qmp"]);
    assert!(error.contains("/nonexistent/vm.qmp") && error.contains("No such file"), "{error}");
}

#[test]
fn an_option_asked_for_help_tells_what_it_takes_and_nothing_is_started() {
    let text = succeed(&["--nbd-server", "help"]);
    assert!(text.starts_with("--nbd-server OPTIONS") && text.contains("addr.type=unix"), "{text}");
    // One dash is enough, as with QEMU.
    assert!(succeed(&["-device", "help"]).contains("virtio-blk-device"));
}

#[test]
fn a_daemon_that_nobody_can_talk_to_says_so() {
    let mut command = Command::new(binary());
    let mut daemon = command.args(["-machine", "none"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(daemon.stderr.take().unwrap()).read_line(&mut line).unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(line.contains("without --qmp and --nbd-server nobody can talk to this"), "{line}");
}

#[test]
fn the_demo_goes_through_and_leaves_nothing_behind() {
    if !require::kvm() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let output = Command::new(binary())
        .args(["demo", "--guest", &repo("resources/guest").display().to_string()])
        .env("TMPDIR", temp.path())
        .output()
        .unwrap();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert_eq!(stdout.matches("/mnt/notes: all is well").count(), 3, "{stdout}");
    assert!(stdout.contains("No errors were found on the image."), "{stdout}");
    assert!(is_empty(temp.path()), "the demo left files behind");
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}
