//! Failures of the host at every operation, and a host that is cut off in between.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::qcow2::{Probe, Qcow2};
use block::storage::Storage;
use block::storage::memory::{MemoryStorage, Op};
use block::{Format, Result, Together, WriteBuf};

use crate::common::{
    self, Start as _, check, check_leaks_only, create, have_qemu_img, land, load, new_snapshot,
    qemu_contents, save,
};

fn open(storage: &Arc<MemoryStorage>) -> Qcow2 {
    let storage: Arc<dyn Storage> = storage.clone();
    Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap()
}

/// A small image with a snapshot of its own and data in both.
fn prepared(dir: &Path, options: &str) -> Vec<u8> {
    let image = create(dir, "a.qcow2", "1M", options);
    let storage = Arc::new(MemoryStorage::new(std::fs::read(image).unwrap()));
    let format = open(&storage);
    common::write(&format, 0, &[1; 300_000]);
    save(&format, "old");
    common::write(&format, 100_000, &[2; 100_000]);
    format.flush().unwrap();
    drop(format);
    storage.bytes()
}

type Job = fn(&Qcow2) -> Result<()>;

fn save_new(format: &Qcow2) -> Result<()> {
    let mut change = format.create_snapshot(&new_snapshot("new"))?;
    for n in 0..4 {
        change.write_vmstate(n * 65536, &[WriteBuf::new(&[9; 65536])])?;
    }
    change.set_vmstate_size(4 * 65536);
    change.prepare()?;
    change.publish()?;
    change.finish()
}

fn revert_old(format: &Qcow2) -> Result<()> {
    land(&mut *format.revert_snapshot("1")?)
}

/// With a guest that writes what is there already, before it and after it was shown.
fn revert_shown(format: &Qcow2) -> Result<()> {
    let mut change = format.revert_snapshot("1")?;
    change.prepare()?;
    format.write(0, &[WriteBuf::new(&[1; 5000])])?;
    format.write(150_000, &[WriteBuf::new(&[2; 5000])])?;
    change.show(&Together::new(1))?;
    format.write(90_000, &[WriteBuf::new(&[1; 50_000])])?;
    change.publish()?;
    change.finish()
}

fn delete_old(format: &Qcow2) -> Result<()> {
    land(&mut *format.delete_snapshot("1")?)
}

fn write_some(format: &Qcow2) -> Result<()> {
    format.write(50_000, &[WriteBuf::new(&[3; 200_000])])?;
    format.write_zeroes(0, 1 << 17, true)?;
    format.flush()
}

const JOBS: [(&str, Job); 5] = [
    ("save", save_new),
    ("revert", revert_old),
    ("shown revert", revert_shown),
    ("delete", delete_old),
    ("write", write_some),
];

/// One failing operation at each place: the job fails or works, and the image is sound either way.
fn fail_everywhere(options: &str) {
    if !have_qemu_img("faults") {
        return;
    }
    {
        let dir = tempfile::tempdir().unwrap();
        let image = prepared(dir.path(), options);
        for (name, job) in JOBS {
            for at in 0.. {
                let storage = Arc::new(MemoryStorage::new(image.clone()));
                let format = open(&storage);
                let before = common::read_all(&format);
                storage.fail_after(Some(at), true);
                let result = job(&format);
                let met = storage.failed();
                storage.fail_after(None, false);
                let tags: Vec<_> = format.snapshots().into_iter().map(|s| s.tag).collect();
                if result.is_err() && name == "save" {
                    assert!(tags == ["old"] || tags == ["old", "new"], "{name} {at}: {tags:?}");
                    assert!(common::read_all(&format) == before, "{name} {at}");
                }
                // It goes on working.
                common::write(&format, 0, &[5; 4096]);
                let now = common::read_all(&format);
                format.flush().unwrap();
                drop(format);
                let file = dir.path().join("after.qcow2");
                std::fs::write(&file, storage.bytes()).unwrap();
                // Steps that cannot be undone (finish) may leak; before them nothing may.
                if result.is_err() && !(name == "save" && tags == ["old"]) {
                    check_leaks_only(&file);
                } else {
                    check(&file);
                }
                if !met || at % 8 == 0 {
                    assert!(qemu_contents(dir.path(), &file, None) == now, "{name} {at}");
                }
                if !met {
                    assert!(result.is_ok(), "{name} {at}: {result:?}");
                    break;
                }
            }
        }
    }
}

#[test]
fn a_failing_operation_anywhere_leaves_a_sound_image() {
    fail_everywhere("cluster_size=64k");
}

#[test]
fn a_failing_operation_anywhere_leaves_a_sound_version_2_image() {
    fail_everywhere("cluster_size=4k,compat=0.10");
}

/// What qemu-img says of a cut-off image before any repair: leaks at most.
fn leaks_at_most(dir: &Path, bytes: &[u8], case: &str) {
    let file = dir.join("cut-off.qcow2");
    std::fs::write(&file, bytes).unwrap();
    let args = ["check", "-f", "qcow2", &common::path(&file)];
    let output = Command::new("qemu-img").args(args).run().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{case}: {text}");
}

/// qemu-img makes the image sound by taking leaked clusters back, nothing else.
fn leaks_are_all(dir: &Path, bytes: &[u8], case: &str) {
    let file = dir.join("cut-off.qcow2");
    std::fs::write(&file, bytes).unwrap();
    let args = ["check", "-q", "-f", "qcow2", "-r", "leaks", &common::path(&file)];
    let status = Command::new("qemu-img").args(args).run().unwrap().status;
    assert!(status.success(), "{case}: {status}");
    check(&file);
}

/// The host loses power after each operation: what was flushed is a valid image with the old
/// snapshot, and it is the disk of before or of after.
#[test]
fn power_failure_anywhere_keeps_the_old_snapshot() {
    if !have_qemu_img("power failure") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = prepared(dir.path(), "cluster_size=4k");
    let before = {
        let storage = Arc::new(MemoryStorage::new(image.clone()));
        let format = open(&storage);
        let now = common::read_all(&format);
        load(&format, "old");
        (now, common::read_all(&format))
    };
    for (name, job) in JOBS {
        for at in 0.. {
            let storage = Arc::new(MemoryStorage::new(image.clone()));
            let format = open(&storage);
            // From here on nothing reaches the disk.
            storage.fail_after(Some(at), false);
            let _ = job(&format);
            let met = storage.failed();
            drop(format);
            for (kind, bytes) in [("power", storage.flushed_bytes()), ("kill", storage.bytes())] {
                let case = format!("{name} {at} {kind}");
                leaks_at_most(dir.path(), &bytes, &case);
                leaks_are_all(dir.path(), &bytes, &case);
                let storage = Arc::new(MemoryStorage::new(bytes));
                let format = open(&storage);
                let now = common::read_all(&format);
                let (old, new) = match name {
                    "revert" | "shown revert" => (true, now == before.1),
                    "write" => (true, true),
                    "delete" => (format.snapshots().iter().any(|s| s.tag == "old"), false),
                    _ => (true, false),
                };
                assert!(now == before.0 || new, "{name} {at} {kind}");
                if old {
                    load(&format, "old");
                    assert!(common::read_all(&format) == before.1, "{name} {at} {kind}");
                }
                if let Some(new) = format.snapshots().into_iter().find(|s| s.tag == "new") {
                    let mut state = vec![0; 4 * 65536];
                    let reader = format.open_vmstate(&new.id).unwrap();
                    reader.read(0, &[block::ReadBuf::new(&mut state)]).unwrap();
                    assert!(state.iter().all(|b| *b == 9), "{name} {at}: published but not whole");
                }
            }
            if !met {
                break;
            }
        }
    }
}

#[test]
fn a_full_host_fails_a_write_and_a_save_and_gives_everything_back() {
    if !have_qemu_img("full host") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = prepared(dir.path(), "cluster_size=64k");
    let storage = Arc::new(MemoryStorage::new(image.clone()));
    let format = open(&storage);
    let mut before = common::read_all(&format);
    for spare in [0, 65536, 3 * 65536, 5 * 65536] {
        storage.set_capacity(Some(image.len() as u64 + spare));
        let error = save_new(&format).unwrap_err().to_string();
        assert!(error.contains("No space left"), "{error}");
        assert_eq!(format.snapshots().len(), 1);
        assert!(common::read_all(&format) == before);
        let error = format.write(0, &[WriteBuf::new(&vec![8; 1 << 20])]).unwrap_err();
        assert!(error.to_string().contains("No space left"), "{error}");
        // What had a place already may have been written.
        before = common::read_all(&format);
        storage.set_capacity(None);
        format.flush().unwrap();
        let file = dir.path().join("after.qcow2");
        std::fs::write(&file, storage.bytes()).unwrap();
        check(&file);
    }
    save_new(&format).unwrap();
    drop(format);
    let file = dir.path().join("after.qcow2");
    std::fs::write(&file, storage.bytes()).unwrap();
    check(&file);
}

/// A snapshot of a fully allocated image writes each table once, and flushes a few times.
#[test]
fn a_snapshot_of_a_full_image_costs_its_tables_not_its_clusters() {
    if !have_qemu_img("cost") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "cluster_size=4k,preallocation=metadata");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&image).unwrap()));
    let format = open(&storage);
    // 16384 clusters: 32 L2 tables, 8 or 9 refcount blocks.
    for job in [save_new as Job, delete_old] {
        storage.record();
        job(&format).unwrap();
        let done = storage.recorded();
        let count = |wanted: fn(&Op) -> bool| done.iter().filter(|op| wanted(op)).count();
        let writes = count(|op| matches!(op, Op::Write(..)));
        let flushes = count(|op| matches!(op, Op::Flush));
        assert!(writes < 70, "{writes} writes");
        assert!(flushes < 8, "{flushes} flushes");
        // The old tables give their space back.
        let discards = count(|op| matches!(op, Op::Discard(..)));
        assert!(discards < 50, "{discards} discards");
    }
    drop(format);
    std::fs::write(&image, storage.bytes()).unwrap();
    check(&image);
}
