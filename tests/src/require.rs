//! What a test needs of the host.

use std::path::{Path, PathBuf};

use crate::repo;

/// Whether tests that run guests can run here. Without `/dev/kvm` they say loudly that they were
/// skipped, and where `CI` is `true` they fail instead: a CI that skips them would prove nothing.
pub fn kvm() -> bool {
    if Path::new("/dev/kvm").exists() {
        return true;
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI=true, but there is no /dev/kvm");
    eprintln!("SKIPPED: there is no /dev/kvm, so no guest can run");
    false
}

/// Whether `program` of QEMU is there to compare with. Without it tests say loudly that they were
/// skipped, and fail where `CI` is `true`.
pub fn program(program: &str) -> bool {
    if std::process::Command::new(program).arg("--version").output().is_ok() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "CI=true, but {program} is not installed"
    );
    eprintln!("SKIPPED: {program} is not installed: nothing to compare with");
    false
}

/// A Python that has qemu.qmp: `TARDIGRADE_PYTHON`, or the environment that `make test` sets up.
pub fn python() -> Option<PathBuf> {
    let given = std::env::var_os("TARDIGRADE_PYTHON").map(PathBuf::from);
    let python = given.unwrap_or_else(|| repo(".venv/bin/python"));
    let has_client = std::process::Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .output()
        .map(|output| output.status);
    if has_client.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    let problem = format!("{} has no qemu.qmp ('make test' sets it up)", python.display());
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI=true, but {problem}");
    eprintln!("SKIPPED: {problem}");
    None
}
