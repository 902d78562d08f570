//! Repairs: ours judged by `qemu-img check`, QEMU's by ours, and both cut off midway.

use std::path::Path;
use std::process::Command;

use block::Progress;
use block::qcow2::check::{self, Options, Repair, Report};
use block::qcow2::create::{CreateOptions, create};
use block::storage::memory::MemoryStorage;
use block::storage::{FileOptions, FileStorage, Storage};

use crate::check::{Random, damage, our_check, qemu_check, zoo};
use crate::common::{Start as _, have_qemu_img, path, qemu_img, qemu_io};

fn repair(image: &Path, repair: Repair) -> block::Result<Report> {
    let storage = FileStorage::open(image, FileOptions::default())?;
    check::check(&storage, &Options { repair, progress: None })
}

fn rounds() -> (u64, usize) {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    (number("CHECK_SEED").unwrap_or(1), number("CHECK_ROUNDS").map_or(8, |n| n as usize))
}

fn lines(report: &Report) -> String {
    report.findings.iter().map(|f| format!("{f:?}\n")).collect()
}

#[test]
fn what_we_repaired_is_clean_for_qemu() {
    if !have_qemu_img("repair") {
        return;
    }
    let (seed, rounds) = rounds();
    let dir = tempfile::tempdir().unwrap();
    let mut repaired = 0;
    for image in zoo(dir.path()) {
        let whole = std::fs::read(&image).unwrap();
        let mut random = Random(0x1234_5678_9abc_def1 ^ seed);
        for round in 0..rounds {
            let mut bytes = whole.clone();
            let what = damage(&mut bytes, &mut random);
            let what = format!("{} round {round}: {what}", image.display());
            std::fs::write(&image, &bytes).unwrap();
            // What cannot be found any more, or needs a wider refcount, cannot be repaired.
            let Ok(report) = repair(&image, Repair::All) else { continue };
            if report.check_errors > 0 || lines(&report).contains("than its refcount can tell") {
                continue;
            }
            let (status, _, text) = qemu_check(&image, &[]);
            assert_eq!(status, 0, "{what}\n{text}\nours: {}", lines(&report));
            assert!(report.is_clean(), "{what}\n{}", lines(&report));
            repaired += u32::from(report.corruptions_fixed + report.leaks_fixed > 0);
        }
        std::fs::write(&image, &whole).unwrap();
    }
    eprintln!("{repaired} images were repaired");
    assert!(repaired > 20);
}

#[test]
fn what_qemu_repaired_is_clean_for_us() {
    if !have_qemu_img("repair") {
        return;
    }
    let (seed, rounds) = rounds();
    let dir = tempfile::tempdir().unwrap();
    let mut clean = 0;
    for image in zoo(dir.path()) {
        let whole = std::fs::read(&image).unwrap();
        let mut random = Random(0x0fed_cba9_8765_4321 ^ seed);
        for _ in 0..rounds {
            let mut bytes = whole.clone();
            let what = damage(&mut bytes, &mut random);
            std::fs::write(&image, &bytes).unwrap();
            let (status, _, text) = qemu_check(&image, &["-r", "all"]);
            let again = qemu_check(&image, &[]).0;
            if status != 0 || again != 0 {
                continue;
            }
            let report = our_check(&image).unwrap();
            if report.overlaps == 0 {
                assert!(report.is_clean(), "{what}\n{text}\n{}", lines(&report));
                clean += 1;
            }
        }
        std::fs::write(&image, &whole).unwrap();
    }
    eprintln!("{clean} images were clean");
    assert!(clean > 20);
}

#[test]
fn leaks_are_repaired_alone_and_data_stays() {
    if !have_qemu_img("repair") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = zoo(dir.path()).remove(0);
    let data = || qemu_io(&image, &["read -P 3 10k 20k", "read -P 1 32k 40k"]);
    assert!(!data().contains("failed"));
    // Snapshots taken away from the header leave their clusters behind.
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[60..72].fill(0);
    std::fs::write(&image, &bytes).unwrap();
    let report = repair(&image, Repair::Leaks).unwrap();
    assert!(report.is_clean() && report.leaks_fixed > 20, "{report:?}");
    assert_eq!(qemu_check(&image, &[]).0, 0);
    assert!(!data().contains("failed"), "{}", data());
    let report = repair(&image, Repair::Leaks).unwrap();
    assert_eq!((report.leaks_fixed, report.corruptions_fixed), (0, 0));
}

#[test]
fn a_lazy_image_that_was_killed_is_repaired_at_opening() {
    if !have_qemu_img("repair") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = crate::common::create(dir.path(), "lazy.qcow2", "16M", "lazy_refcounts=on");
    let status = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "flush", "-c", "sigraise 9"])
        .arg(&image)
        .run()
        .unwrap();
    assert!(!status.status.success());
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes[79] & 1, 1, "the dirty bit is set");
    assert_eq!(
        our_check(&image).unwrap().exit_code(),
        u8::try_from(qemu_check(&image, &[]).0).unwrap()
    );
    let storage = FileStorage::open(&image, FileOptions::default()).unwrap();
    check::repair_at_open(&storage).unwrap();
    drop(storage);
    assert_eq!(std::fs::read(&image).unwrap()[79], 0);
    assert_eq!(qemu_check(&image, &[]).0, 0);
    assert!(!qemu_io(&image, &["read -P 7 1M 3M"]).contains("failed"));
    assert!(qemu_img(&["info", &path(&image)]).contains("corrupt: false"));
}

/// Data that has the place of a table is the guest's only copy, and so is the table: both are there
/// after one repair, also of one that is made at an opening.
#[test]
fn one_repair_parts_data_from_a_table_that_it_shares_a_cluster_with() {
    if !have_qemu_img("repair") {
        return;
    }
    // The counts of the second cannot tell of more than one reference.
    for options in ["", "refcount_bits=1"] {
        part_data_from_tables(options);
    }
}

fn part_data_from_tables(options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let image = crate::common::create(dir.path(), "shared.qcow2", "16M", options);
    assert!(!qemu_io(&image, &["write -P 5 0 64k", "write -P 6 1M 1M"]).contains("failed"));
    let whole = std::fs::read(&image).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
    let (l1, table) = (be64(40), be64(48));
    let offset = 0x00ff_ffff_ffff_fe00;
    let l2 = (be64(l1 as usize) & offset) as usize;
    let block = be64(table as usize);
    for (what, place) in [("the L1 table", l1), ("the refcount table", table), ("a block", block)] {
        let what = format!("{what} {options}");
        for dirty in [false, true] {
            let mut bytes = whole.clone();
            bytes[l2..l2 + 8].copy_from_slice(&(1 << 63 | place).to_be_bytes());
            bytes[79] |= u8::from(dirty);
            std::fs::write(&image, &bytes).unwrap();
            if dirty {
                let storage = FileStorage::open(&image, FileOptions::default()).unwrap();
                check::repair_at_open(&storage).unwrap();
            } else {
                let report = repair(&image, Repair::All).unwrap();
                assert_eq!(report.exit_code(), 0, "{what}\n{}", lines(&report));
            }
            let (status, _, text) = qemu_check(&image, &[]);
            assert_eq!(status, 0, "{what}\n{text}");
            let report = our_check(&image).unwrap();
            assert!(report.is_clean() && report.overlaps == 0, "{what}\n{}", lines(&report));
            // Either destroys the other no more.
            let after = std::fs::read(&image).unwrap();
            assert_eq!(&after[79..80], [0], "{what}: the marks are gone");
            let data =
                || qemu_io(&image, &["read -P 6 1M 1M", "write -P 9 0 64k", "read -P 6 1M 1M"]);
            let said = data();
            assert!(!said.contains("failed"), "{what}: {said}");
            assert_eq!(qemu_check(&image, &[]).0, 0, "{what} after a write");
        }
    }
}

#[test]
fn a_file_of_too_many_clusters_is_neither_counted_nor_changed() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("long.qcow2");
    std::fs::write(&image, []).unwrap();
    let storage = FileStorage::open(&image, FileOptions::default()).unwrap();
    let options =
        CreateOptions { size: 1 << 20, cluster_size: Some(512), ..CreateOptions::default() };
    create(&storage, None, &options, &Progress::default()).unwrap();
    if let Err(e) = storage.set_len(2 << 40) {
        eprintln!("SKIPPED: no sparse file of 2 TiB: {e}");
        return;
    }
    drop(storage);
    for what in [Repair::No, Repair::Leaks, Repair::All] {
        let report = repair(&image, what).unwrap();
        assert_eq!(report.exit_code(), 1, "{}", lines(&report));
        let [finding] = &report.findings[..] else { panic!("{}", lines(&report)) };
        assert!(finding.text.contains("more than 2147483647 clusters"), "{}", finding.text);
    }
}

/// A repair that is cut off at any of its writes is made good by another one, with the same result.
#[test]
fn a_repair_that_is_cut_off_is_made_good_by_the_next() {
    if !have_qemu_img("repair") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = zoo(dir.path()).remove(0);
    let whole = std::fs::read(&image).unwrap();
    let mut random = Random(0x5555_1234_9abc_def1);
    let all = Options { repair: Repair::All, progress: None };
    for round in 0..6 {
        let mut bytes = whole.clone();
        let what = damage(&mut bytes, &mut random);
        let storage = MemoryStorage::new(bytes.clone());
        check::check(&storage, &all).unwrap();
        let changes = storage.changes();
        let result = disk_of(dir.path(), &storage.bytes());
        for cut in 0..changes {
            let storage = MemoryStorage::new(bytes.clone());
            storage.fail_after(Some(cut), false);
            check::check(&storage, &all).unwrap_err();
            for left in [storage.bytes(), storage.flushed_bytes()] {
                let marked = left[79] & 2 != 0;
                let storage = MemoryStorage::new(left);
                let found = check::check(&storage, &Options::default()).unwrap();
                assert!(
                    marked || found.corruptions == 0 || storage.bytes() == bytes,
                    "{what} cut {cut}: damaged, half repaired and not marked\n{}",
                    lines(&found)
                );
                let report = check::check(&storage, &all).unwrap();
                assert!(report.is_clean(), "round {round} cut {cut}: {}", lines(&report));
                assert_eq!(disk_of(dir.path(), &storage.bytes()), result, "{what} cut {cut}");
            }
        }
    }
}

/// The disk that QEMU sees in an image.
fn disk_of(dir: &Path, image: &[u8]) -> Vec<u8> {
    let file = dir.join("disk.qcow2");
    std::fs::write(&file, image).unwrap();
    assert_eq!(qemu_check(&file, &[]).0, 0);
    // Compressed data may be damaged too, which no check looks at.
    let raw = dir.join("disk.raw");
    qemu_img(&["convert", "--salvage", "-O", "raw", &path(&file), &path(&raw)]);
    std::fs::read(&raw).unwrap()
}

/// Any bytes, in the header too, are answered with a report or an error, and a repair of what can be
/// checked leads to something that can be checked.
#[test]
fn no_bytes_make_a_check_or_a_repair_panic() {
    if !have_qemu_img("repair") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x7777_1234_9abc_def1);
    let mut checked = 0;
    for image in zoo(dir.path()) {
        let whole = std::fs::read(&image).unwrap();
        for _ in 0..40 {
            let mut bytes = whole.clone();
            damage(&mut bytes, &mut random);
            for _ in 0..random.below(3) {
                let at = random.below(112);
                bytes[at] ^= 1 << random.below(8);
            }
            if random.below(4) == 0 {
                bytes.truncate(random.below(whole.len()));
            }
            let storage = MemoryStorage::new(bytes);
            let found = check::check(&storage, &Options::default());
            let all = Options { repair: Repair::All, progress: None };
            if found.is_ok() && check::check(&storage, &all).is_ok() {
                check::check(&storage, &Options::default()).unwrap();
                checked += 1;
            }
        }
    }
    assert!(checked > 100, "{checked}");
}
