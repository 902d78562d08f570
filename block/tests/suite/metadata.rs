//! Writes that would hit metadata, and the header's own changes.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use block::qcow2::{Corruption, Options, OverlapCheck, Probe, Qcow2};
use block::storage::Storage;
use block::storage::memory::MemoryStorage;
use block::{Error, Format, WriteBuf};

use crate::common::{self, Start as _, create, have_qemu_img, path, save};

const CLUSTER: usize = 65536;

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn open(storage: &Arc<MemoryStorage>, options: Options) -> Qcow2 {
    let storage: Arc<dyn Storage> = storage.clone();
    Qcow2::open_with(Probe::new(storage).unwrap(), None, options).unwrap()
}

/// An image with data at 0, two snapshots and an L2 table of its own; no cluster before its end is free.
fn good(dir: &Path) -> Vec<u8> {
    let image = create(dir, "a.qcow2", "1G", "");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(image).unwrap()));
    let format = open(&storage, Options::default());
    common::write(&format, 0, &[1; CLUSTER]);
    save(&format, "one");
    common::write(&format, 600 << 20, &[1; CLUSTER]);
    save(&format, "two");
    common::write(&format, 0, &[2; CLUSTER]);
    common::write(&format, 100 << 20, &[3; 24 * CLUSTER]);
    drop(format);
    storage.bytes()
}

/// Host offsets of one cluster of each kind.
fn places(image: &[u8]) -> Vec<(&'static str, OverlapCheck, u64)> {
    let (l1, table, snapshots) = (be64(image, 40), be64(image, 48), be64(image, 64));
    let entry = |at: u64| be64(image, at as usize) & 0x00ff_ffff_ffff_fe00;
    let inactive_l1 = be64(image, snapshots as usize);
    vec![
        ("qcow2_header", OverlapCheck::MAIN_HEADER, 0),
        ("active L1 table", OverlapCheck::ACTIVE_L1, l1),
        ("active L2 table", OverlapCheck::ACTIVE_L2, entry(l1)),
        ("refcount table", OverlapCheck::REFCOUNT_TABLE, table),
        ("refcount block", OverlapCheck::REFCOUNT_BLOCK, entry(table)),
        ("snapshot table", OverlapCheck::SNAPSHOT_TABLE, snapshots),
        ("inactive L1 table", OverlapCheck::INACTIVE_L1, inactive_l1),
        ("inactive L2 table", OverlapCheck::INACTIVE_L2, entry(inactive_l1)),
    ]
}

/// The image with its first data cluster said to be at `place`.
fn misdirected(image: &[u8], place: u64) -> Vec<u8> {
    let l2 = places(image)[2].2 as usize;
    let mut bytes = image.to_vec();
    // The header's offset 0 would be no allocation.
    let entry = 1 << 63 | if place == 0 { 0 } else { place };
    bytes[l2..l2 + 8].copy_from_slice(&u64::to_be_bytes(entry));
    bytes
}

#[test]
fn a_write_onto_metadata_is_prevented_told_and_ends_all_writes() {
    if !have_qemu_img("overlap") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    for (title, kind, place) in places(&image).into_iter().skip(1) {
        let bytes = misdirected(&image, place);
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let options = Options { overlap_check: OverlapCheck::ALL, ..Options::default() };
        let format = open(&storage, options);
        let told: Arc<Mutex<Vec<Corruption>>> = Arc::default();
        let hook = told.clone();
        format.on_corruption(move |c| hook.lock().unwrap().push(c.clone()));
        let error = format.write(100, &[WriteBuf::new(&[9; 512])]).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        let reason = format!("Preventing invalid write on metadata (overlaps with {title})");
        assert!(error.to_string().contains(&reason), "{error}");
        assert!(format.write(300 << 20, &[WriteBuf::new(&[9; 512])]).is_err(), "{title}");
        format.flush().unwrap();
        let event = Corruption {
            reason: reason.clone(),
            offset: Some(place),
            size: Some(65536),
            fatal: true,
        };
        assert_eq!(*told.lock().unwrap(), [event]);
        drop(format);
        let mut after = storage.bytes();
        assert_eq!(after[79] & 2, 2, "{title}: the corrupt bit");
        after[79] &= !2;
        assert!(after == bytes, "{title}: something else was written");

        // QEMU sees the same, in the same words, as far as it looks by default.
        let file = dir.path().join("b.qcow2");
        std::fs::write(&file, &bytes).unwrap();
        let args = ["-f", "qcow2", "-c", "write 0 512", &path(&file)];
        let output = Command::new("qemu-io").args(args).run().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if OverlapCheck::default().contains(kind) {
            assert!(text.contains(&reason), "{title}: {text}");
        }
    }
}

/// Where the bitmap directory is, by the header extension.
fn bitmap_directory(image: &[u8]) -> u64 {
    let be32 = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
    let mut at = be32(100) as usize;
    while be32(at) != 0x2385_2875 {
        assert_ne!(be32(at), 0, "no bitmaps extension");
        at += 8 + (be32(at + 4) as usize).next_multiple_of(8);
    }
    be64(image, at + 8 + 16)
}

#[test]
fn a_write_onto_the_bitmap_directory_is_prevented_as_by_qemu() {
    if !have_qemu_img("overlap with bitmaps") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("b.qcow2");
    std::fs::write(&file, good(dir.path())).unwrap();
    common::qemu_img(&["bitmap", "--add", &path(&file), "b"]);
    let image = std::fs::read(&file).unwrap();
    let reason = "Preventing invalid write on metadata (overlaps with bitmap directory)";
    let bytes = misdirected(&image, bitmap_directory(&image));
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let format = open(&storage, Options::default());
    let error = format.write(100, &[WriteBuf::new(&[9; 512])]).unwrap_err().to_string();
    assert!(error.contains(reason), "{error}");
    drop(format);
    assert_eq!(storage.bytes()[79] & 2, 2, "the corrupt bit");
    std::fs::write(&file, &bytes).unwrap();
    let args = ["-f", "qcow2", "-c", "write 0 512", &path(&file)];
    let output = Command::new("qemu-io").args(args).run().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains(reason), "{text}");
}

#[test]
fn what_was_written_before_damage_was_found_is_kept() {
    if !have_qemu_img("before damage") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let storage = Arc::new(MemoryStorage::new(misdirected(&image, be64(&image, 40))));
    let format = open(&storage, Options::default());
    common::write(&format, 300 << 20, &[7; CLUSTER]);
    format.write(100, &[WriteBuf::new(&[9; 512])]).unwrap_err();
    format.flush().unwrap();
    drop(format);
    let format = open(&storage, Options { read_only: true, ..Options::default() });
    assert!(common::read(&format, 300 << 20, CLUSTER) == [7; CLUSTER]);
}

#[test]
fn kinds_that_are_not_to_be_checked_are_not() {
    if !have_qemu_img("overlap none") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    for (title, kind, place) in places(&image).into_iter().skip(1) {
        let storage = Arc::new(MemoryStorage::new(misdirected(&image, place)));
        let options = Options { overlap_check: OverlapCheck::ALL - kind, ..Options::default() };
        let format = open(&storage, options);
        let result = format.write(30_000, &[WriteBuf::new(&[9; 512])]);
        assert!(result.is_ok(), "{title}: {result:?}");
    }
}

#[test]
fn clusters_of_metadata_that_count_as_free_are_not_taken() {
    if !have_qemu_img("free metadata") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let block = be64(&image, be64(&image, 48) as usize) as usize;
    let (reftable, blocks) = (be64(&image, 48) as usize, block);
    for (title, _, place) in places(&image) {
        let mut bytes = image.clone();
        let at = blocks + (place as usize / CLUSTER) * 2;
        bytes[at..at + 2].fill(0);
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let format = open(&storage, Options::default());
        let error = format.write(300 << 20, &[WriteBuf::new(&[9; 512])]);
        if title == "qcow2_header" {
            // No search begins at the header, whose cluster is never free.
            error.unwrap();
            continue;
        }
        if title == "inactive L2 table" {
            continue;
        }
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&format!("overlaps with {title}")), "{error}");
        drop(format);
        let mut after = storage.bytes();
        after[79] &= !2;
        assert!(after == bytes, "{title}: something was written");
    }
    // Without a block everything counts as free, and the block's own place is the header's.
    let mut bytes = image.clone();
    bytes[reftable..reftable + 8].fill(0);
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let format = open(&storage, Options::default());
    let error = format.write(300 << 20, &[WriteBuf::new(&[9; 512])]).unwrap_err().to_string();
    assert!(error.contains("overlaps with"), "{error}");
    drop(format);
    let mut after = storage.bytes();
    after[79] &= !2;
    assert!(after == bytes, "something was written");
}

#[test]
fn damage_of_a_read_only_image_is_told_once_and_changes_nothing() {
    if !have_qemu_img("read-only damage") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let mut bytes = image.clone();
    let l2 = places(&image)[2].2 as usize;
    bytes[l2..l2 + 8].copy_from_slice(&(1u64 << 63 | 0x5_0200).to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let format = open(&storage, Options { read_only: true, ..Options::default() });
    let told: Arc<Mutex<Vec<Corruption>>> = Arc::default();
    let hook = told.clone();
    format.on_corruption(move |c| hook.lock().unwrap().push(c.clone()));
    let mut buf = [0; 512];
    for _ in 0..2 {
        assert!(format.read(0, &[block::ReadBuf::new(&mut buf)]).is_err());
    }
    assert_eq!(common::read(&format, 600 << 20, 1), [1]);
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 1);
    assert!(!told[0].fatal);
    assert!(storage.bytes() == bytes);
}

/// An image with header extensions that nobody knows, before and after those that are known.
fn with_unknown_extensions(dir: &Path, options: &str) -> (Vec<u8>, [Vec<u8>; 2]) {
    let image = create(dir, "a.qcow2", "4M", options);
    let mut bytes = std::fs::read(image).unwrap();
    let unknown = [
        [&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5][..], b"hello\0\0\0"].concat(),
        [&[0x0a, 0xbc, 0xde, 0xf0, 0, 0, 0, 8][..], b"eight by"].concat(),
    ];
    let start = if bytes[7] == 2 { 72 } else { be64(&bytes, 96) as u32 as usize };
    let mut at = start;
    while bytes[at..at + 4] != [0; 4] {
        let len = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        at += 8 + len.next_multiple_of(8);
    }
    let known = bytes[start..at].to_vec();
    let all = [&unknown[0][..], &known, &unknown[1], &[0; 8]].concat();
    bytes[start..start + all.len()].copy_from_slice(&all);
    (bytes, unknown)
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn a_new_backing_file_keeps_what_the_header_has_and_qemu_sees_it() {
    if !have_qemu_img("set backing") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in ["", "compat=0.10", "cluster_size=2M", "cluster_size=4k,lazy_refcounts=on"] {
        let (bytes, unknown) = with_unknown_extensions(dir.path(), options);
        let storage = Arc::new(MemoryStorage::new(bytes));
        let format = open(&storage, Options::default());
        let long = "x".repeat(1000);
        for (name, format_name) in [
            (Some("base.raw"), Some("raw")),
            (Some("other.qcow2"), Some("qcow2")),
            (Some("other.qcow2"), None),
            (Some(long.as_str()), Some("raw")),
            (None, None),
            (Some("again"), Some("qcow2")),
        ] {
            format.set_backing(name, format_name).unwrap();
            let now = storage.bytes();
            for part in &unknown {
                assert!(contains(&now[..4096], part), "{options} {name:?}");
            }
            let dynamic: Arc<dyn Storage> = storage.clone();
            let probe = Probe::new(dynamic).unwrap();
            assert_eq!((probe.backing_file(), probe.backing_format()), (name, format_name));
            let file = dir.path().join("b.qcow2");
            std::fs::write(&file, &now).unwrap();
            let info = common::qemu_img(&["info", "-U", "--output=json", &path(&file)]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename"].as_str(), name, "{options}");
            assert_eq!(info["backing-filename-format"].as_str(), format_name, "{options}");
        }
        let error = format.set_backing(Some(&"x".repeat(1024)), None).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        let info = format.info();
        assert_eq!(info.backing_file.as_deref(), Some("again"), "memory as the disk");
    }
}

#[test]
fn a_backing_file_change_cut_off_anywhere_leaves_the_old_name_or_the_new() {
    if !have_qemu_img("set backing, cut off") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (bytes, _) = with_unknown_extensions(dir.path(), "compat=0.10");
    let storage = Arc::new(MemoryStorage::new(bytes));
    let format = open(&storage, Options::default());
    format.set_backing(Some("old"), Some("raw")).unwrap();
    drop(format);
    let image = storage.bytes();
    for at in 0.. {
        let storage = Arc::new(MemoryStorage::new(image.clone()));
        let format = open(&storage, Options::default());
        storage.fail_after(Some(at), false);
        let result = format.set_backing(Some("the new one"), Some("qcow2"));
        let met = storage.failed();
        assert_eq!(result.is_err(), met, "{at}");
        for bytes in [storage.bytes(), storage.flushed_bytes()] {
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes));
            let probe = Probe::new(storage).unwrap();
            let found = (probe.backing_file(), probe.backing_format());
            let old = (Some("old"), Some("raw"));
            let new = (Some("the new one"), Some("qcow2"));
            assert!(found == new || (met && found == old), "{at}: {found:?}");
        }
        if !met {
            break;
        }
    }
}
