//! What the disk can do, measured by `dd` with data that is not zero.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use tardigrade_tests::pattern;
use tempfile::NamedTempFile;

use crate::report::Report;

/// MiB written and read.
const SIZE: u64 = 1024;

/// `dd`, with its data in memory.
pub(crate) struct Dd {
    source: NamedTempFile,
    file: PathBuf,
}

impl Dd {
    /// Makes the data; files are to be written in `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let source = NamedTempFile::new_in("/dev/shm").unwrap();
        write_pattern(source.as_file());
        Self { source, file: dir.join("dd") }
    }

    /// One round. Files are new, so that writing them includes their allocation.
    pub(crate) fn measure(&self, report: &mut Report) {
        // Of a run that was stopped.
        let _ = std::fs::remove_file(&self.file);
        let from = format!("if={}", self.source.path().display());
        let to = format!("of={}", self.file.display());
        let back = format!("if={}", self.file.display());
        let time = dd(&[&from, &to, "bs=1M", "oflag=direct"]);
        report.add("dd write s", "direct", SIZE, time);
        let time = dd(&[&back, "of=/dev/null", "bs=1M", "iflag=direct"]);
        report.add("dd read s", "direct", SIZE, time);
        std::fs::remove_file(&self.file).unwrap();
        let time = dd(&[&from, &to, "bs=1M", "conv=fdatasync"]);
        report.add("dd write s", "fdatasync", SIZE, time);
        std::fs::remove_file(&self.file).unwrap();
    }
}

fn write_pattern(file: &File) {
    let mut file = BufWriter::with_capacity(1 << 20, file);
    for word in 0..SIZE << 17 {
        file.write_all(&pattern::word(1, word).to_le_bytes()).unwrap();
    }
    file.flush().unwrap();
}

fn dd(arguments: &[&str]) -> f64 {
    let start = Instant::now();
    let output = Command::new("dd").args(arguments).output().unwrap();
    assert!(output.status.success(), "dd: {}", String::from_utf8_lossy(&output.stderr));
    start.elapsed().as_secs_f64()
}
