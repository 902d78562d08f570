//! Our check against `qemu-img check`, on whole images and on damaged ones.

use std::path::{Path, PathBuf};
use std::process::Command;

use block::qcow2::check::{self, Options, Report};
use block::storage::{FileOptions, FileStorage};
use serde_json::Value;

use crate::common::{Start as _, create, have_qemu_img, path, qemu_img, qemu_io};

/// Numbers that look random and are the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() >> 16).unwrap() % n
    }
}

/// What QEMU finds: its exit status, and its counts if it could open the image.
pub(crate) fn qemu_check(image: &Path, args: &[&str]) -> (i32, Option<Value>, String) {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json"])
        .args(args)
        .arg(image)
        .run()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).ok(), text)
}

pub(crate) fn our_check(image: &Path) -> block::Result<Report> {
    let options = FileOptions { read_only: true, ..FileOptions::default() };
    check::check(&FileStorage::open(image, options)?, &Options::default())
}

/// The counts of both, or the exit status 1 of an image that cannot be checked wholly.
#[track_caller]
fn same(image: &Path, what: &str) -> u8 {
    let (status, counts, text) = qemu_check(image, &[]);
    let ours = our_check(image);
    let findings = match &ours {
        Ok(report) => report.findings.iter().map(|f| format!("{f:?}\n")).collect(),
        Err(e) => e.to_string(),
    };
    let code = ours.as_ref().map_or(1, Report::exit_code);
    if let Ok(report) = &ours
        && report.overlaps > 0
        && code != 1
    {
        // QEMU does not look for these; the rest must agree.
        let theirs = counts.as_ref().map_or(0, |c| c["corruptions"].as_u64().unwrap_or(0));
        assert_eq!(report.corruptions - report.overlaps, theirs, "{what}\n{text}\n{findings}");
        return code;
    }
    assert_eq!(i32::from(code), status, "{what}\nQEMU: {text}\nours: {findings}");
    if let (Ok(report), Some(Value::Object(mut theirs))) = (ours, counts)
        && code != 1
    {
        theirs.remove("filename");
        theirs.remove("format");
        let ours = serde_json::to_value(report).unwrap();
        assert_eq!(ours, Value::Object(theirs), "{what}\nQEMU: {text}\nours: {findings}");
    }
    code
}

/// Images of many kinds, with data, snapshots, zero and compressed clusters.
pub(crate) fn zoo(dir: &Path) -> Vec<PathBuf> {
    let kinds = [
        ("plain", "cluster_size=4096"),
        ("small", "cluster_size=512"),
        ("v2", "compat=0.10,cluster_size=4096"),
        ("narrow", "cluster_size=4096,refcount_bits=1"),
        ("wide", "cluster_size=4096,refcount_bits=64"),
        ("sub", "cluster_size=16384,extended_l2=on"),
        ("zstd", "cluster_size=4096,compression_type=zstd"),
        ("lazy", "cluster_size=4096,lazy_refcounts=on"),
        ("bitmaps", "cluster_size=4096"),
    ];
    let mut images = Vec::new();
    for (name, options) in kinds {
        let image = create(dir, &format!("{name}.qcow2"), "3M", options);
        qemu_io(&image, &["write -P 1 0 300k", "write -P 2 1M 100k"]);
        if name == "narrow" {
            // Its counts go up to 1: neither snapshots nor clusters that are shared.
            images.push(image);
            continue;
        }
        qemu_io(&image, &["write -c -P 5 2M 64k"]);
        if name != "v2" {
            qemu_io(&image, &["write -z 100k 64k", "write -z -u 1M 32k"]);
        }
        if name == "bitmaps" {
            qemu_img(&["bitmap", "--add", "-g", "4096", &path(&image), "b0"]);
            qemu_io(&image, &["write -P 1 0 30k", "write -P 2 1M 10k"]);
        }
        for tag in ["a", "b"] {
            qemu_img(&["snapshot", "-c", tag, &path(&image)]);
            qemu_io(&image, &["write -P 3 10k 20k", "write -P 4 700k 30k"]);
        }
        images.push(image);
    }
    let image = create(
        dir,
        "data.qcow2",
        "3M",
        &format!("cluster_size=4096,data_file={}", path(&dir.join("data.raw"))),
    );
    qemu_io(&image, &["write -P 1 0 300k", "write -P 2 1M 100k", "write -z 100k 64k"]);
    images.push(image);
    images
}

#[test]
fn whole_images_of_every_kind_are_counted_as_qemu_counts_them() {
    if !have_qemu_img("check") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for image in zoo(dir.path()) {
        assert_eq!(same(&image, &path(&image)), 0, "{}", image.display());
    }
}

#[test]
fn randomly_damaged_images_are_judged_as_qemu_judges_them() {
    if !have_qemu_img("check") {
        return;
    }
    let rounds = std::env::var("CHECK_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let seed = std::env::var("CHECK_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let dir = tempfile::tempdir().unwrap();
    let mut codes = [0; 4];
    for image in zoo(dir.path()) {
        let whole = std::fs::read(&image).unwrap();
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
        for round in 0..rounds {
            let mut bytes = whole.clone();
            let what = damage(&mut bytes, &mut random);
            std::fs::write(&image, &bytes).unwrap();
            let what = format!("{} round {round}: {what}", image.display());
            codes[usize::from(same(&image, &what))] += 1;
        }
        // What neither can look into, whatever the random damages were.
        let mut bytes = whole.clone();
        bytes[4..8].copy_from_slice(&99u32.to_be_bytes());
        std::fs::write(&image, &bytes).unwrap();
        codes[usize::from(same(&image, "version 99"))] += 1;
        std::fs::write(&image, &whole).unwrap();
    }
    eprintln!("exit statuses: {codes:?}");
    assert!(codes.iter().all(|n| *n > 0), "too little variety: {codes:?}");
}

/// Places and sizes in the header that lead out of the file, one at a time, and files that end early.
#[test]
fn tables_past_the_end_of_the_file_are_judged_as_qemu_judges_them() {
    if !have_qemu_img("check") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for image in zoo(dir.path()) {
        let whole = std::fs::read(&image).unwrap();
        let cluster = 1usize << u32::from_be_bytes(whole[20..24].try_into().unwrap());
        let end = whole.len().next_multiple_of(cluster);
        // L1 table, refcount table, snapshot table.
        for field in [40, 48, 64] {
            for at in [end, end + cluster, 1 << 40] {
                let mut bytes = whole.clone();
                bytes[field..field + 8].copy_from_slice(&(at as u64).to_be_bytes());
                std::fs::write(&image, &bytes).unwrap();
                same(&image, &format!("{}: field {field} is {at:#x}", image.display()));
            }
        }
        // Sizes of the L1 table and of the refcount table, the latter as large as it may be.
        for (field, value) in [(36, 100_000), (56, (8 << 20) / cluster)] {
            let mut bytes = whole.clone();
            if field == 36 {
                // Where there is no data that would be taken for entries.
                bytes[40..48].copy_from_slice(&(end as u64).to_be_bytes());
            }
            bytes[field..field + 4].copy_from_slice(&(value as u32).to_be_bytes());
            std::fs::write(&image, &bytes).unwrap();
            same(&image, &format!("{}: field {field} is {value}", image.display()));
        }
        for len in [whole.len() - 1, whole.len() - cluster, whole.len() / 2, cluster + 1, 4096] {
            std::fs::write(&image, &whole[..len.min(whole.len())]).unwrap();
            same(&image, &format!("{}: cut to {len}", image.display()));
        }
        std::fs::write(&image, &whole).unwrap();
    }
}

/// Changes a few table entries: words that are not zero, outside of what looks like data.
pub(crate) fn damage(bytes: &mut [u8], random: &mut Random) -> String {
    let mut what = String::new();
    for _ in 0..=random.below(3) {
        let at = loop {
            let at = random.below(bytes.len() / 8) * 8;
            let word = &bytes[at..at + 8];
            let data = word.iter().all(|b| *b == word[0]);
            if !data && at >= 512 {
                break at;
            }
        };
        let old = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let new = match random.below(8) {
            0 => 0,
            1 => old ^ 1 << random.below(64),
            2 => old ^ 1 << 63,
            3 => old.wrapping_add(512),
            4 => old.wrapping_add(4096),
            5 => old.wrapping_add(1 << 40),
            6 => u64::from_be_bytes(bytes[at - 8..at].try_into().unwrap()),
            _ => old ^ 1 << random.below(24),
        };
        bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
        what.push_str(&format!("{at:#x}: {old:x} -> {new:x}; "));
    }
    what
}
