//! What the disk can do, measured by `dd` with data that is not zero.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use tardigrade_tests::pattern;

use crate::ROUNDS;
use crate::report::Report;

/// MiB written and read.
const SIZE: u64 = 1024;

pub(crate) fn measure(dir: &Path, report: &mut Report) {
    let source = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    write_pattern(source.as_file());
    let from = format!("if={}", source.path().display());
    let file = dir.join("dd");
    let (to, back) = (format!("of={}", file.display()), format!("if={}", file.display()));
    for _ in 0..ROUNDS {
        // A file that is there already would be overwritten in place, and not allocated.
        let _ = std::fs::remove_file(&file);
        let time = dd(&[&from, &to, "bs=1M", "oflag=direct"]);
        report.add("dd write s", "direct", SIZE, time);
        let time = dd(&[&back, "of=/dev/null", "bs=1M", "iflag=direct"]);
        report.add("dd read s", "direct", SIZE, time);
        std::fs::remove_file(&file).unwrap();
        let time = dd(&[&from, &to, "bs=1M", "conv=fdatasync"]);
        report.add("dd write s", "fdatasync", SIZE, time);
        std::fs::remove_file(&file).unwrap();
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
