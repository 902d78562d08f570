//! Images that nobody has open: opened, made, checked and repaired while a call fails or is short.

use std::path::Path;

use block::qcow2::check::{self, Repair, Severity};
use block::qcow2::create::CreateOptions;
use block::storage::{FileOptions, FileStorage};
use block::{Graph, Preallocation};
use serde_json::json;

use crate::calls::{Call, Fault, Kind, with_fault};
use crate::images::{Images, check_sound, disk, make, qcow2, small, write};

const FAILURES: [(Kind, bool); 3] = [
    (Kind::Errno(libc::EIO), false),
    (Kind::Errno(libc::EIO), true),
    (Kind::Errno(libc::ENOSPC), true),
];

/// The files of an image whose process was killed: counts were deferred, and it says so.
fn killed(dir: &Path) -> std::path::PathBuf {
    let (open, left) = (dir.join("open.qcow2"), dir.join("left.qcow2"));
    make(&open, &CreateOptions { lazy_refcounts: Some(true), ..small() }).unwrap();
    let graph = Graph::new();
    let node = graph.add(&qcow2("d", &open, &json!({}))).unwrap();
    for n in 0..12 {
        write(&node, n * 17_000, 5).unwrap();
    }
    node.flush().unwrap();
    std::fs::copy(&open, &left).unwrap();
    left
}

fn is_dirty(image: &Path) -> bool {
    std::fs::read(image).unwrap()[79] & 1 == 1
}

#[test]
fn any_fault_of_the_opening_of_a_dirty_image_is_told_or_mended() {
    let dir = tempfile::tempdir().unwrap();
    let left = killed(dir.path());
    let image = dir.path().join("a.qcow2");
    let options = qcow2("d", &image, &json!({}));
    let fresh = || std::fs::copy(&left, &image).unwrap();
    fresh();
    assert!(is_dirty(&image));
    let (mut wanted, mut count) = (Vec::new(), 0);
    for (kind, lasting) in [(Kind::Short, false)].into_iter().chain(FAILURES) {
        for at in 0.. {
            fresh();
            let case = format!("{kind:?}, lasting {lasting}, call {at}");
            let graph = Graph::new();
            let fault = Fault { at, kind, lasting };
            let (opened, hits) = with_fault(fault, || graph.add(&options));
            if wanted.is_empty() {
                wanted = disk(opened.as_ref().unwrap());
            }
            match &opened {
                Ok(node) => {
                    assert!(disk(node) == wanted, "{case}");
                    // A reading that fails once is tried again by the repair.
                    let mended = |hit| !matches!(hit, Call::Open | Call::Write | Call::Flush);
                    let short = kind == Kind::Short;
                    assert!(short || hits.iter().all(|hit| mended(*hit)), "{case}: {hits:?}");
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("a.qcow2'"), "{case}: {text}");
                    assert!(kind != Kind::Short, "{case}: {text}");
                    assert!(graph.list().is_empty(), "{case}");
                }
            }
            drop(opened);
            drop(graph);
            let graph = Graph::new();
            let node = graph.add(&options).unwrap_or_else(|e| panic!("{case}: again: {e}"));
            assert!(disk(&node) == wanted, "{case}: again");
            drop(node);
            graph.remove("d").unwrap();
            check_sound(&image, &case);
            assert!(!is_dirty(&image), "{case}");
            if hits.is_empty() {
                break;
            }
            count += 1;
        }
    }
    println!("faults injected: {count} (opening of a dirty image)");
}

/// The file after an operation with each transfer short in turn is what it is without.
fn short_everywhere(name: &str, prepare: impl Fn(&Path), run: impl Fn(&Path)) -> u32 {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    prepare(&image);
    run(&image);
    let wanted = std::fs::read(&image).unwrap();
    for at in 0.. {
        prepare(&image);
        let fault = Fault { at, kind: Kind::Short, lasting: false };
        let ((), hits) = with_fault(fault, || run(&image));
        assert!(std::fs::read(&image).unwrap() == wanted, "{name}, transfer {at}");
        if hits.is_empty() {
            return at;
        }
    }
    unreachable!()
}

/// All are short, and each is of fewer bytes than the one before it asked for.
fn short_always(prepare: impl Fn(&Path), run: impl Fn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let (whole, image) = (dir.path().join("whole.qcow2"), dir.path().join("a.qcow2"));
    for image in [&whole, &image] {
        prepare(image);
    }
    run(&whole);
    let fault = Fault { at: 0, kind: Kind::Short, lasting: true };
    let ((), hits) = with_fault(fault, || run(&image));
    assert!(!hits.is_empty());
    assert!(std::fs::read(&image).unwrap() == std::fs::read(&whole).unwrap());
}

fn checked(image: &Path, repair: Repair) -> check::Report {
    let storage = FileStorage::open(image, FileOptions::default()).unwrap();
    check::check(&storage, &check::Options { repair, progress: None }).unwrap()
}

/// An image of clusters that nobody refers to, and of one that two have.
fn damage(image: &Path) {
    make(image, &CreateOptions { preallocation: Some(Preallocation::Full), ..small() }).unwrap();
    let mut bytes = std::fs::read(image).unwrap();
    let at = |bytes: &[u8], at: usize| {
        let entry = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap()
    };
    let l1 = at(&bytes, 40);
    let l2 = at(&bytes, l1);
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    bytes[l2 + 16..l2 + 24].fill(0);
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn short_transfers_at_open_create_check_and_repair_change_nothing() {
    let nothing = |image: &Path| drop(std::fs::remove_file(image));
    let creating = |image: &Path| {
        let options = CreateOptions { preallocation: Some(Preallocation::Full), ..small() };
        make(image, &options).unwrap();
    };
    let checking = |image: &Path| {
        let report = checked(image, Repair::No);
        assert!(report.leaks > 0 && report.corruptions > 0, "{report:?}");
        let unread = |found: &check::Finding| found.severity == Severity::Unchecked;
        assert!(!report.findings.iter().any(unread), "{report:?}");
    };
    let repairing = |image: &Path| {
        let report = checked(image, Repair::All);
        assert!(report.is_clean() && report.corruptions_fixed > 0, "{report:?}");
    };
    let images = Images::make();
    let valid = |image: &Path| {
        let copy = images.copy();
        for name in ["one.qcow2", "top.qcow2"] {
            std::fs::copy(copy.at(name), image.with_file_name(name)).unwrap();
        }
        std::fs::copy(copy.at("top.qcow2"), image).unwrap();
    };
    let opening = |image: &Path| {
        let graph = Graph::new();
        let node = graph.add(&qcow2("d", image, &json!({}))).unwrap();
        assert_eq!(node.bitmaps().all().len(), 2);
        assert!(disk(&node)[9000..12_000].iter().all(|byte| *byte == 3));
        drop(node);
        graph.remove("d").unwrap();
    };
    let mut count = short_everywhere("create", nothing, creating);
    count += short_everywhere("check", damage, checking);
    count += short_everywhere("repair", damage, repairing);
    count += short_everywhere("open", valid, opening);
    short_always(nothing, creating);
    short_always(damage, checking);
    short_always(damage, repairing);
    short_always(valid, opening);
    println!("faults injected: {count} (each transfer cut short in turn)");
}
