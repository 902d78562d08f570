//! What a test needs of the host.

use std::path::Path;

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
