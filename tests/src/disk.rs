//! Images, made and judged by `qemu-img`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Runs `qemu-img`; panics with its output if it fails.
pub fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().expect("qemu-img is not installed");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A disk image in a test's directory.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// "qcow2" or "raw".
    pub format: &'static str,
}

impl Disk {
    /// A new qcow2 image.
    pub fn qcow2(path: impl Into<PathBuf>, size: &str) -> Self {
        Self::create(path.into(), "qcow2", &[], size)
    }

    /// A new image with `-o` options.
    pub fn create(path: PathBuf, format: &'static str, options: &[&str], size: &str) -> Self {
        let mut args = vec!["create", "-q", "-f", format];
        let joined = options.join(",");
        if !joined.is_empty() {
            args.extend(["-o", &joined]);
        }
        let file = path.display().to_string();
        args.extend([file.as_str(), size]);
        qemu_img(&args);
        Self { path, format }
    }

    /// The file's name.
    pub fn file(&self) -> String {
        self.path.display().to_string()
    }

    /// Panics unless `qemu-img check` finds nothing at all, leaks included.
    pub fn check(&self) {
        qemu_img(&["check", "-q", "-f", self.format, &self.file()]);
    }

    /// `qemu-img info`
    pub fn info(&self) -> Value {
        serde_json::from_str(&qemu_img(&["info", "--output=json", &self.file()])).unwrap()
    }

    /// Tags in the snapshot table.
    pub fn tags(&self) -> Vec<String> {
        let info = self.info();
        let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
        snapshots.iter().map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
    }

    /// What the guest's disk holds, read through QEMU; of a snapshot if one is named.
    pub fn read(&self, snapshot: Option<&str>) -> Vec<u8> {
        let raw = self.path.with_extension("as-raw");
        let (file, out) = (self.file(), raw.display().to_string());
        let mut args = vec!["convert", "-f", self.format, "-O", "raw"];
        if let Some(tag) = snapshot {
            args.extend(["-l", tag]);
        }
        args.extend([file.as_str(), out.as_str()]);
        qemu_img(&args);
        let bytes = std::fs::read(&raw).unwrap();
        std::fs::remove_file(&raw).unwrap();
        bytes
    }

    /// Bytes the file takes on the host.
    pub fn allocated(&self) -> u64 {
        allocated(&self.path)
    }
}

/// Bytes a file takes on the host.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}
