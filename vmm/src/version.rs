//! The versions that this program reports.

use qmp::schema::{VersionInfo, VersionTriple};

/// The program's own version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The version that QMP clients are told: the QEMU whose protocol is spoken, and this program as
/// its package.
pub fn qmp_version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { micro: 0, minor: 0, major: 10 },
        package: format!("tardigrade-{VERSION}"),
    }
}
