//! The end of a machine: whatever ends it, the disks hold what the guest wrote, the process ends
//! with success, and the terminal is as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::{Value, json};
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::process::wait_for_end;
use tardigrade_tests::pty::Terminal;
use tardigrade_tests::vm::{Vm, binary};
use tardigrade_tests::{pattern, require};

const ONE: Booted = Booted { vcpus: 1, disks: 1 };
const PATIENCE: Duration = Duration::from_secs(120);

/// Ends a machine whose guest has just written, in the middle of more work.
fn ends_well(end: impl FnOnce(&Vm), reason: &str) {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut qmp = vm.qmp();
    let mut agent = vm.agent();
    agent.ask("pattern vda 1M 128K 5");
    agent.ask("load disk vda 16M 16M");
    while agent.number("load status", "disk-steps") < 4 {}
    end(&vm);
    let event = qmp.wait_event(PATIENCE, |event| event["event"] == "SHUTDOWN").unwrap();
    assert_eq!(event["data"], json!({ "guest": false, "reason": reason }));
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.stderr());
    assert!(!vm.qmp_path().exists() && !vm.serial_path().exists(), "a socket is left behind");
    let disk = ONE.disks(dir.path()).remove(0);
    disk.check();
    let expected = pattern::bytes(5, 1 << 20, 128 << 10);
    assert_eq!(disk.read(None)[1 << 20..][..128 << 10], expected);
}

#[test]
fn sigterm_ends_a_machine_at_work_with_its_disks_in_order() {
    ends_well(|vm| vm.signal(libc::SIGTERM), "host-signal");
}

#[test]
fn sigint_ends_a_machine_at_work_with_its_disks_in_order() {
    ends_well(|vm| vm.signal(libc::SIGINT), "host-signal");
}

#[test]
fn quit_ends_a_machine_at_work_with_its_disks_in_order() {
    let quit = |vm: &Vm| {
        assert_eq!(vm.qmp().execute("quit", json!({})).unwrap(), json!({}));
    };
    ends_well(quit, "host-qmp-quit");
}

#[test]
fn a_signal_during_a_save_leaves_the_image_as_before_or_with_the_whole_checkpoint() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut qmp = vm.qmp();
    let arguments =
        json!({ "job-id": "j", "tag": "cut", "vmstate": "disk0", "devices": ["disk0"] });
    qmp.execute("snapshot-save", arguments).unwrap();
    qmp.wait_event(PATIENCE, |event| event["event"] == "STOP").unwrap();
    vm.signal(libc::SIGTERM);
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.stderr());
    let disk = ONE.disks(dir.path()).remove(0);
    // No leak either: what the save had written was given back.
    disk.check();
    let tags = disk.tags();
    if tags == [TAG, "cut"] {
        let spec = ONE.machine(std::slice::from_ref(&disk)).args(&["--loadvm", "cut"]);
        assert_eq!(spec.start().agent().ask("echo whole"), "whole");
    } else {
        assert_eq!(tags, [TAG]);
    }
}

/// A machine whose serial port is the terminal, running and at the other end of it.
fn on_terminal(terminal: &mut Terminal, dir: &Path) -> Child {
    let spec = ONE.spec(dir).args(&["--loadvm", TAG, "--serial", "stdio"]);
    let child = terminal.spawn(Command::new(binary()).args(spec.arguments()));
    // Typed only once the mode is raw: until then the terminal itself would echo it.
    terminal.wait_for_mode(PATIENCE, |mode| mode.flags[3] & libc::ICANON == 0);
    terminal.type_in("t1 echo from the guest\n");
    let printed = terminal.read_until(PATIENCE, |text| text.ends_with("t1 ok from the guest\r\n"));
    // The program's own messages may come before; nothing is echoed, and nothing is doubled.
    assert_eq!(printed.matches("t1").count(), 1, "{printed:?}");
    child
}

/// What ends a machine.
type End = dyn Fn(&mut Terminal, &Child);

#[test]
fn the_terminal_is_raw_for_the_guest_and_put_back_whatever_ends_the_machine() {
    if !require::kvm() {
        return;
    }
    let by_signal = |_: &mut Terminal, child: &Child| {
        // SAFETY: the child has not been waited for, so the process id is its own.
        assert_eq!(unsafe { libc::kill(child.id().try_into().unwrap(), libc::SIGTERM) }, 0);
    };
    let by_key = |terminal: &mut Terminal, _: &Child| terminal.type_in("\x03");
    let by_guest = |terminal: &mut Terminal, _: &Child| terminal.type_in("t2 poweroff\n");
    let ends: [(&str, &End); 3] =
        [("SIGTERM", &by_signal), ("Ctrl-C", &by_key), ("poweroff", &by_guest)];
    for (name, end) in ends {
        let dir = tempfile::tempdir().unwrap();
        let mut terminal = Terminal::open();
        let before = terminal.mode();
        let mut child = on_terminal(&mut terminal, dir.path());
        assert_ne!(terminal.mode(), before);
        end(&mut terminal, &child);
        assert!(wait_for_end(&child, PATIENCE), "{name} does not end the program");
        assert_eq!(child.wait().unwrap().code(), Some(0), "{name}");
        assert_eq!(terminal.mode(), before, "after {name}");
        ONE.disks(dir.path())[0].check();
    }
}

#[test]
fn a_machine_that_cannot_start_leaves_the_terminal_alone() {
    let terminal = Terminal::open();
    let before = terminal.mode();
    let args = ["--kernel", "/nonexistent/kernel", "--serial", "stdio"];
    let mut child = terminal.spawn(Command::new(binary()).args(args));
    assert!(wait_for_end(&child, PATIENCE));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(terminal.mode(), before);
}

#[test]
fn a_machine_that_is_stopped_ends_on_quit_and_forgets_its_jobs() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut qmp = vm.qmp();
    qmp.execute("stop", json!({})).unwrap();
    let arguments = json!({ "job-id": "j", "tag": "no-such-tag", "devices": ["disk0"] });
    qmp.execute("snapshot-delete", arguments).unwrap();
    let is = |event: &Value, status: &str| event["data"]["status"] == status;
    qmp.wait_event(PATIENCE, |event| is(event, "concluded")).unwrap();
    qmp.execute("quit", json!({})).unwrap();
    // A concluded job that nobody dismissed goes, as in QEMU.
    qmp.wait_event(PATIENCE, |event| is(event, "null")).unwrap();
    assert_eq!(vm.wait().code(), Some(0), "{}", vm.stderr());
    ONE.disks(dir.path())[0].check();
}
