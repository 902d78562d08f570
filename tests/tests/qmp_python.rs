//! A session of qemu.qmp, the Python client that QEMU's own tools use: `python/test_qmp_client.py`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::process::Command;

use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::{repo, require};

#[test]
fn qemus_python_client_saves_changes_loads_and_deletes() {
    if !require::kvm() {
        return;
    }
    let Some(python) = require::python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let booted = Booted { vcpus: 1, disks: 1 };
    let vm = booted.start(dir.path());
    let output = Command::new(python)
        .arg(repo("tests/python/test_qmp_client.py"))
        .arg("--verbose")
        .env("TARDIGRADE_QMP", vm.qmp_path())
        .env("TARDIGRADE_SERIAL", vm.serial_path())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report}\nThe machine said:\n{}", vm.stderr());
    assert!(report.contains("Ran 5 tests") && !report.contains("skipped"), "{report}");
    assert_eq!(vm.status(), "running");
    vm.quit();
    let disk = booted.disks(dir.path()).remove(0);
    assert_eq!(disk.tags(), [TAG]);
    disk.check();
}
