//! Crashes and failures at every single write of an image with bitmaps, and damaged ones.

use std::process::Command;
use std::sync::Arc;

use crate::bitmap::NewBitmap;
use crate::node::{Details, Node};
use crate::qcow2::{Probe, Qcow2};
use crate::storage::Storage;
use crate::storage::memory::MemoryStorage;
use crate::{Error, ReadBuf, Result, WriteBuf};

const SIZE: u64 = 8 << 20;

/// An image made by qemu-img with bitmaps; `None`, and a word of it, where that is not installed.
fn image(options: &str, commands: &[&[&str]]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.qcow2");
    let run = |args: &[&str]| {
        let args = args.iter().map(|arg| if *arg == "FILE" { file.to_str().unwrap() } else { arg });
        let program = Command::new("qemu-img").args(args).output();
        program.map(|output| assert!(output.status.success(), "{output:?}")).is_ok()
    };
    if !run(&["create", "-q", "-f", "qcow2", "-o", options, "FILE", &SIZE.to_string()]) {
        eprintln!("SKIPPED: qemu-img is not installed (apt-get install qemu-utils)");
        return None;
    }
    commands.iter().for_each(|args| assert!(run(args)));
    Some(std::fs::read(file).unwrap())
}

/// Whether qemu-img finds nothing worse than leaks.
#[track_caller]
fn check(bytes: &[u8], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.qcow2");
    std::fs::write(&file, bytes).unwrap();
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&file).output();
    let output = output.unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{what}: {output:?}");
}

fn open(storage: &Arc<MemoryStorage>, read_only: bool) -> Result<Node> {
    let storage: Arc<dyn Storage> = storage.clone();
    let image = Arc::new(Qcow2::open(Probe::new(storage)?, None, read_only)?);
    let details = Details {
        bitmaps: image.bitmaps().clone(),
        qcow2: Some(image.clone()),
        ..Details::default()
    };
    Ok(Node::with_details("d".to_owned(), image, details))
}

fn contents(node: &Node) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(node.size()).unwrap()];
    node.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

fn new(name: &str, granularity: u64) -> NewBitmap<'_> {
    NewBitmap { name, granularity: Some(granularity), persistent: true, disabled: false }
}

/// What is done with an image between opening and closing, by which bitmaps change in every way.
fn work(storage: &Arc<MemoryStorage>) -> Result<()> {
    let node = open(storage, false)?;
    node.write(3 << 20, &[WriteBuf::new(&[7; 70_000])])?;
    node.add_bitmap(&new("new", 512))?;
    node.enable_bitmap("off", true)?;
    node.write(5 << 20, &[WriteBuf::new(&[8; 1000])])?;
    node.flush()?;
    node.remove_bitmap("gone")?;
    node.write_zeroes(3 << 20, 4096, true)?;
    if let Some(image) = node.qcow2() {
        image.store_bitmaps()?;
    }
    drop(node);
    let node = open(storage, false)?;
    node.write(6 << 20, &[WriteBuf::new(&[9; 512])])?;
    if let Some(image) = node.qcow2() {
        image.store_bitmaps()?;
    }
    Ok(())
}

/// A crash left `bytes`: whatever of the disk differs from `before` is dirty in a bitmap that
/// followed all writes, unless that says it is inconsistent or is not there at all.
fn check_crash(bytes: &[u8], before: &[u8], what: &str) {
    check(bytes, what);
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let node = open(&storage, true).unwrap_or_else(|e| panic!("{what}: {e}"));
    let after = contents(&node);
    let Ok(bitmap) = node.bitmaps().get("b") else {
        panic!("{what}: the bitmap is gone");
    };
    if bitmap.inconsistent() {
        return;
    }
    for extent in bitmap.extents(0, SIZE, usize::MAX).into_iter().filter(|e| !e.dirty) {
        let range = usize::try_from(extent.offset).unwrap()
            ..usize::try_from(extent.offset + extent.len).unwrap();
        assert!(after[range.clone()] == before[range], "{what}: stale at {extent:?}");
    }
}

fn with_bitmaps(options: &str) -> Option<Vec<u8>> {
    let add = |flag, name| ["bitmap", "--add", "-g", "4096", flag, "FILE", name];
    let commands = [add("--enable", "b"), add("--disable", "off"), add("--enable", "gone")];
    image(options, &commands.each_ref().map(|c| &c[..]))
}

#[test]
fn a_crash_at_any_write_leaves_no_bitmap_that_looks_valid_and_is_not() {
    for options in ["cluster_size=65536", "cluster_size=512", "refcount_bits=1"] {
        let Some(start) = with_bitmaps(options) else { return };
        let before = {
            let storage = Arc::new(MemoryStorage::new(start.clone()));
            contents(&open(&storage, true).unwrap())
        };
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        work(&storage).unwrap();
        let total = storage.changes();
        assert!(total > 30, "{total}");
        let mut valid = 0;
        for at in 0..total {
            let storage = Arc::new(MemoryStorage::new(start.clone()));
            storage.fail_after(Some(at), false);
            // A failure to give space back is no failure.
            let ended = work(&storage);
            assert!(storage.failed() && (ended.is_err() || at + 20 > total), "{at}");
            let what = format!("{options}, cut off after {at} of {total}");
            // What got out in the order of writing, and only what was flushed.
            check_crash(&storage.bytes(), &before, &what);
            check_crash(&storage.flushed_bytes(), &before, &format!("{what}, flushed only"));
            let storage = Arc::new(MemoryStorage::new(storage.bytes()));
            let node = open(&storage, true).unwrap();
            valid += u32::from(!node.bitmaps().get("b").unwrap().inconsistent());
        }
        assert!(valid > 0, "some crashes come before the first or after the last write");
    }
}

#[test]
fn a_failure_of_any_write_is_told_and_a_retry_stores_everything() {
    let Some(start) = with_bitmaps("compat=1.1") else { return };
    let whole = {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        work(&storage).unwrap();
        storage.changes()
    };
    let mut failed = 0;
    for at in 0..whole {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        storage.fail_after(Some(at), true);
        let ended = work(&storage);
        assert!(storage.failed(), "{at}");
        failed += u64::from(ended.is_err());
        assert!(matches!(ended, Ok(()) | Err(Error::Io { .. })), "{ended:?}");
        storage.fail_after(None, false);
        check(&storage.bytes(), &format!("after a failure at {at}"));
        // The image was dropped after the failure, which stored what it could.
        let node = open(&storage, false).unwrap_or_else(|e| panic!("{at}: {e}"));
        node.write(0, &[WriteBuf::new(&[1; 512])]).unwrap();
        drop(node);
        check(&storage.bytes(), &format!("opened again after a failure at {at}"));
        let node = open(&storage, true).unwrap();
        let bitmap = node.bitmaps().get("b").unwrap();
        if !bitmap.inconsistent() {
            assert!(bitmap.extents(0, 512, 1)[0].dirty, "{at}");
        }
    }
    assert!(failed > whole / 2, "giving space back may fail without a word: {failed} of {whole}");
}

#[test]
fn writes_after_a_failed_closing_leave_no_bitmap_that_looks_valid_and_is_not() {
    let Some(start) = with_bitmaps("compat=1.1") else { return };
    let before = {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        contents(&open(&storage, true).unwrap())
    };
    // How many failures left the new directory in force on disk, and how many kept writes away while they
    // lasted.
    let (mut ahead, mut refused) = (0, 0);
    for (at, once) in (0..200).flat_map(|at| [(at, true), (at, false)]) {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        let node = open(&storage, false).unwrap();
        let directory = places(&storage.bytes()).0;
        node.write(3 << 20, &[WriteBuf::new(&[7; 70_000])]).unwrap();
        node.flush().unwrap();
        let image = node.qcow2().unwrap();
        storage.fail_after(Some(at), once);
        let stored = image.store_bitmaps();
        let failed = storage.failed();
        let moved = places(&storage.bytes()).0 != directory;
        if stored.is_err() && moved {
            ahead += 1;
        }
        let resumed = image.resume_bitmaps();
        let write = || node.write(5 << 20, &[WriteBuf::new(&[8; 1000])]);
        if resumed.is_err() && !once {
            let error = write().unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{at}: {error}");
            refused += 1;
        }
        storage.fail_after(None, false);
        write().unwrap_or_else(|e| panic!("{at}: {resumed:?}, {e}"));
        node.flush().unwrap_or_else(|e| panic!("{at}: {e}"));
        for bytes in [storage.bytes(), storage.flushed_bytes()] {
            check_crash(&bytes, &before, &format!("a failure at {at}, once: {once}"));
        }
        drop((image, node));
        check_crash(&storage.bytes(), &before, &format!("closed after a failure at {at}"));
        if !failed {
            break;
        }
    }
    assert!(ahead >= 2 && refused >= 1, "{ahead}, {refused}");
}

/// Where the directory is, and where the table of its first entry.
fn places(bytes: &[u8]) -> (usize, usize) {
    let magic = 0x2385_2875_u32.to_be_bytes();
    let extension = bytes.windows(4).position(|window| window == magic).unwrap();
    let be64 = |at: usize| {
        usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
    };
    let directory = be64(extension + 24);
    (directory, be64(directory))
}

#[test]
fn damaged_directories_are_refused_by_name_and_read_only_the_disk_can_be_rescued() {
    let Some(good) = with_bitmaps("compat=1.1") else { return };
    let (directory, table) = places(&good);
    let magic = 0x2385_2875_u32.to_be_bytes();
    let extension = good.windows(4).position(|window| window == magic).unwrap();
    for (at, bytes, reason) in [
        (extension + 8, &[0, 0, 0, 0][..], "0 bitmaps, must be 1 to 65535"),
        (extension + 8, &[0, 1, 0, 0], "65536 bitmaps, must be 1 to 65535"),
        (extension + 12, &[1], "reserved field of its header extension is not zero"),
        (extension + 16, &[0x10], "a directory of 1152921504606847"),
        (extension + 31, &[1], "is not a cluster offset"),
        (extension + 26, &[1], "is beyond the end of the file"),
        (extension + 11, &[2], "the directory has 32 bytes after its last entry"),
        (extension + 11, &[4], "directory entry 3 is longer than the directory"),
        (directory + 7, &[1], "its bitmap table offset"),
        (directory + 2, &[1], "its bitmap table at"),
        (directory + 8, &[0, 0, 0, 0], "has no table"),
        (directory + 8, &[0, 0, 0, 2], "has a table of 2 entries, a disk of"),
        (directory + 8, &[0xff], "too large"),
        (directory + 12, &[1], "has reserved flags"),
        (directory + 16, &[2], "is of unknown type 2"),
        (directory + 17, &[8], "has granularity_bits 8, must be 9 to 31"),
        (directory + 17, &[32], "has granularity_bits 32, must be 9 to 31"),
        (directory + 18, &[0, 0], "has a name of 0 bytes"),
        (directory + 18, &[0xff], "is longer than the directory"),
        (directory + 20, &[0xff, 0xff, 0xff, 0xff], "is longer than the directory"),
        (directory + 32, &good[directory..directory + 32], "two bitmaps are called '"),
        (directory + 32, &good[directory..directory + 8], "is used twice"),
        (table, &[0x80], "its data cluster offset"),
        (table + 2, &[1], "its data cluster at"),
        (table, &u64::to_be_bytes(table.try_into().unwrap()), "is used twice"),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let storage = Arc::new(MemoryStorage::new(bad.clone()));
        let error = open(&storage, false).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("corrupt: bitmaps: ") && error.contains(reason), "{error}");
        assert!(storage.bytes() == bad, "nothing was written");
        let node = open(&storage, true).unwrap();
        assert!(node.bitmaps().all().is_empty());
        assert!(contents(&node).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn random_damage_neither_panics_nor_takes_memory_by_claim() {
    let Some(good) = with_bitmaps("cluster_size=512") else { return };
    let (directory, table) = places(&good);
    let mut random = 0x1234_5678_u64;
    let mut next = |n: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random >> 20).unwrap() % n
    };
    let mut opened = 0;
    for _ in 0..4000 {
        let mut bad = good.clone();
        for _ in 0..=next(3) {
            let at = [0x1f8, directory, table][next(3)] + next(120);
            let at = at.min(bad.len() - 1);
            bad[at] = [0, 1, 0xff, 0x80, 8][next(5)];
        }
        let storage = Arc::new(MemoryStorage::new(bad));
        if let Ok(node) = open(&storage, false) {
            opened += 1;
            let _ = node.write(0, &[WriteBuf::new(&[1; 512])]);
            for bitmap in node.bitmaps().all() {
                let _ = node.remove_bitmap(bitmap.name());
            }
        }
    }
    assert!(opened > 100, "{opened}");
}

#[test]
fn extra_data_is_kept_and_what_is_not_known_is_left_alone_but_for_the_mark() {
    let add = |name| ["bitmap", "--add", "-g", "4096", "FILE", name];
    let commands =
        [add("b"), add("compatible-extra-data-1234567"), add("other-extra-data-12345678901")];
    let Some(mut bytes) = image("compat=1.1", &commands.each_ref().map(|c| &c[..])) else { return };
    let (directory, _) = places(&bytes);
    // The first 8 bytes of two names become extra data; the names are those bytes shorter then.
    let mut at = directory;
    for flags in [None, Some(2 | 4), Some(2)] {
        let name_len = usize::from(bytes[at + 19]);
        let len = (24 + name_len).next_multiple_of(8);
        if let Some(flags) = flags {
            bytes[at + 15] = flags;
            bytes[at + 19] -= 8;
            bytes[at + 23] = 8;
        }
        at += len;
    }
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let node = open(&storage, false).unwrap();
    let names: Vec<_> = node.bitmaps().infos().into_iter().map(|b| b.name).collect();
    assert_eq!(names, ["le-extra-data-1234567", "b"]);
    node.write(0, &[WriteBuf::new(&[1; 512])]).unwrap();
    drop(node);
    let node = open(&storage, true).unwrap();
    let stored = node.qcow2().unwrap().stored_bitmaps();
    let told: Vec<_> = stored.iter().map(|b| (b.name.as_str(), b.in_use, b.auto)).collect();
    let other = ("tra-data-12345678901", true, true);
    assert_eq!(told, [("b", false, true), ("le-extra-data-1234567", false, true), other]);
    let directory = places(&storage.bytes()).0;
    let all = &storage.bytes()[directory..directory + 256];
    for extra in [&b"compatible-extra-data-1234567"[..], b"other-extra-data-12345678901"] {
        assert!(all.windows(extra.len()).any(|window| window == extra), "extra data before name");
    }
}

#[test]
fn bitmaps_that_another_program_let_go_stale_are_not_read_and_make_room_for_new_ones() {
    let Some(mut bytes) = with_bitmaps("compat=1.1") else { return };
    // As an old program does: the autoclear bit goes, the extension stays.
    bytes[95] = 0;
    let storage = Arc::new(MemoryStorage::new(bytes));
    let node = open(&storage, false).unwrap();
    assert!(node.bitmaps().all().is_empty() && node.qcow2().unwrap().stored_bitmaps().is_empty());
    drop(node);
    assert_eq!(storage.bytes()[95], 0);
    let node = open(&storage, false).unwrap();
    node.add_bitmap(&new("b", 65536)).unwrap();
    node.write(1 << 20, &[WriteBuf::new(&[1; 512])]).unwrap();
    drop(node);
    check(&storage.bytes(), "the old ones leak");
    let node = open(&storage, true).unwrap();
    assert_eq!(node.bitmaps().get("b").unwrap().dirty_bytes(), 65536);
    assert_eq!(node.bitmaps().all().len(), 1);
}
