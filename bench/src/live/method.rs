//! Ways to save a machine that are compared.

use std::path::Path;
use std::time::{Duration, Instant};

use qmp::client::Client;
use serde_json::json;

use crate::program::{Machine, PATIENCE, Program};

/// How a machine is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Ours, as it comes.
    Live,
    /// The same with `x-compress: zstd`.
    Compressed,
    /// Ours with the guest stopped while all of its RAM is written, without tracking: what Firecracker's
    /// full snapshot does.
    StopAndCopy,
    /// QEMU's `snapshot-save`.
    QemuSave,
    /// QEMU's `migrate` to a file with the capability `background-snapshot`: RAM and devices, no disk.
    QemuBackground,
}

impl Method {
    /// Those of programs that are here.
    pub(super) fn all(programs: &[Program]) -> Vec<Self> {
        [Self::Live, Self::Compressed, Self::StopAndCopy, Self::QemuSave, Self::QemuBackground]
            .into_iter()
            .filter(|method| programs.contains(&method.program()))
            .collect()
    }

    pub(super) fn program(self) -> Program {
        match self {
            Self::Live | Self::Compressed | Self::StopAndCopy => Program::Tardigrade,
            Self::QemuSave | Self::QemuBackground => Program::Qemu,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Live => "Tardigrade",
            Self::Compressed => "Tardigrade, zstd",
            Self::StopAndCopy => "stop and copy",
            Self::QemuSave => "QEMU snapshot-save",
            Self::QemuBackground => "QEMU background-snapshot",
        }
    }

    /// Whether it is ours with the guest running.
    pub(super) fn is_live(self) -> bool {
        matches!(self, Self::Live | Self::Compressed)
    }

    /// Options beyond those that all have.
    pub(super) fn options(self) -> &'static [&'static str] {
        match self {
            Self::StopAndCopy => &["--machine", "microvm,dirty-tracking=off"],
            _ => &[],
        }
    }

    /// How its image is made.
    pub(super) fn image_options(self) -> &'static [&'static str] {
        match self {
            Self::Compressed => &["-o", "compression_type=zstd"],
            _ => &[],
        }
    }

    /// How often a machine with that much RAM in use is saved. Only ours is quick enough for many.
    pub(super) fn saves(self, used: u64) -> usize {
        match self {
            Self::Live if used <= 256 => 35,
            Self::Live if used <= 1024 => 12,
            Self::Live | Self::Compressed => 5,
            _ => 1,
        }
    }

    /// Saves; ends when the checkpoint is on the disk.
    pub(super) fn save(self, machine: &mut Machine, tag: &str, dir: &Path) -> Duration {
        match self {
            Self::Live | Self::QemuSave => machine.job("snapshot-save", tag),
            Self::Compressed => {
                machine.job_with("snapshot-save", tag, &json!({ "x-compress": "zstd" }))
            }
            Self::StopAndCopy => {
                machine.job_with("snapshot-save", tag, &json!({ "x-mode": "stop" }))
            }
            Self::QemuBackground => background(&mut machine.connect(), &dir.join("migrated")),
        }
    }
}

fn background(qmp: &mut Client, file: &Path) -> Duration {
    let capability = json!([{ "capability": "background-snapshot", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capability })).unwrap();
    let start = Instant::now();
    qmp.execute("migrate", json!({ "uri": format!("file:{}", file.display()) })).unwrap();
    loop {
        let told = qmp.execute("query-migrate", json!({})).unwrap();
        match told["status"].as_str() {
            Some("completed") => break,
            Some("failed") => panic!("QEMU's migration failed: {told}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
        assert!(start.elapsed() < PATIENCE, "QEMU's migration does not end: {told}");
    }
    let time = start.elapsed();
    std::fs::remove_file(file).unwrap();
    time
}
