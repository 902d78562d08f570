//! Lazy refcounts: the dirty bit stands for counts that are not on disk yet.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::qcow2::{Options, Probe, Qcow2};
use block::storage::Storage;
use block::storage::memory::{MemoryStorage, Op};
use block::{Format, Result};

use crate::common::{
    self, Start as _, check, create, have_qemu_img, path, qemu_contents, qemu_io, save,
};

fn open(storage: &Arc<MemoryStorage>, lazy: Option<bool>) -> Result<Qcow2> {
    let storage: Arc<dyn Storage> = storage.clone();
    let options = Options { lazy_refcounts: lazy, ..Options::default() };
    Qcow2::open_with(Probe::new(storage)?, None, options)
}

fn image(dir: &Path, options: &str) -> Vec<u8> {
    std::fs::read(create(dir, "a.qcow2", "4M", options)).unwrap()
}

fn is_dirty(image: &[u8]) -> bool {
    image[79] & 1 != 0
}

#[test]
fn counts_stay_in_memory_until_the_image_is_closed() {
    if !have_qemu_img("lazy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (options, lazy, expected) in [
        ("lazy_refcounts=on", None, true),
        ("lazy_refcounts=on", Some(false), false),
        ("", Some(true), true),
        ("", None, false),
    ] {
        let bytes = image(dir.path(), options);
        let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
        let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap());
        let storage = Arc::new(MemoryStorage::new(bytes));
        let format = open(&storage, lazy).unwrap();
        storage.record();
        common::write(&format, 0, &[1; 1 << 20]);
        format.flush().unwrap();
        let ops = storage.recorded();
        let counted = ops
            .iter()
            .any(|op| matches!(op, Op::Write(at, _) if (block..block + 65536).contains(at)));
        assert_eq!(counted, !expected, "{options} {lazy:?}");
        let marked = ops.iter().position(|op| *op == Op::Write(72, 8));
        assert_eq!(marked.is_some(), expected, "{options} {lazy:?}");
        if let Some(at) = marked {
            assert_eq!(ops[at + 1], Op::Flush, "the bit is durable before what needs it");
        }
        assert_eq!(is_dirty(&storage.flushed_bytes()), expected);
        // A second flush has nothing to write for counts alone.
        storage.record();
        format.flush().unwrap();
        assert_eq!(storage.recorded(), [Op::Flush]);
        drop(format);
        assert!(!is_dirty(&storage.flushed_bytes()), "closed");
        let file = dir.path().join("b.qcow2");
        std::fs::write(&file, storage.flushed_bytes()).unwrap();
        check(&file);
    }
    let old = Arc::new(MemoryStorage::new(image(dir.path(), "compat=0.10")));
    let error = open(&old, Some(true)).err().unwrap().to_string();
    assert!(error.starts_with("Lazy refcounts require a qcow2 image"), "{error}");
}

#[test]
fn a_crash_at_any_time_is_repaired_by_us_and_by_qemu() {
    if !have_qemu_img("lazy, crash") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(dir.path(), "lazy_refcounts=on,cluster_size=16k");
    let start = {
        let storage = Arc::new(MemoryStorage::new(bytes));
        let format = open(&storage, None).unwrap();
        common::write(&format, 0, &[1; 300_000]);
        save(&format, "old");
        drop(format);
        storage.bytes()
    };
    let mut dirty = 0;
    for at in 0.. {
        let storage = Arc::new(MemoryStorage::new(start.clone()));
        let format = open(&storage, None).unwrap();
        storage.fail_after(Some(at), false);
        let work = || -> Result<()> {
            format.write(100_000, &[block::WriteBuf::new(&[2; 400_000])])?;
            format.flush()?;
            format.discard(0, 65536)?;
            format.flush()?;
            format.write(2 << 20, &[block::WriteBuf::new(&[3; 200_000])])?;
            format.flush()
        };
        let _ = work();
        let met = storage.failed();
        drop(format);
        let crashed = storage.flushed_bytes();
        if is_dirty(&crashed) {
            dirty += 1;
        }
        let ours = Arc::new(MemoryStorage::new(crashed.clone()));
        let format = open(&ours, None).unwrap();
        let now = common::read_all(&format);
        common::load(&format, "old");
        assert!(common::read(&format, 0, 300_000) == vec![1; 300_000], "{at}");
        drop(format);
        let (mine, theirs) = (dir.path().join("mine.qcow2"), dir.path().join("theirs.qcow2"));
        std::fs::write(&mine, ours.bytes()).unwrap();
        check(&mine);
        std::fs::write(&theirs, &crashed).unwrap();
        qemu_io(&theirs, &["write 3M 64k", "read 0 64k"]);
        check(&theirs);
        let contents = qemu_contents(dir.path(), &theirs, None);
        assert!(contents[..3 << 20] == now[..3 << 20], "{at}: repaired to another disk");
        if !met {
            break;
        }
    }
    assert!(dirty > 3, "the dirty bit was hardly ever there: {dirty}");
}

#[test]
fn an_image_that_qemu_did_not_close_is_repaired_when_it_is_opened_for_writing() {
    if !have_qemu_img("lazy, QEMU killed") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "lazy_refcounts=on");
    let commands = ["-c", "write -P 7 64k 1M", "-c", "flush", "-c", "abort"];
    let status =
        Command::new("qemu-io").args(["-f", "qcow2"]).args(commands).arg(path(&image)).run();
    assert!(!status.unwrap().status.success());
    let bytes = std::fs::read(&image).unwrap();
    assert!(is_dirty(&bytes));
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, true).unwrap();
    assert!(common::read(&format, 65536, 1 << 20) == vec![7; 1 << 20]);
    drop(format);
    assert!(storage.bytes() == bytes, "read-only: nothing is repaired");
    let format = open(&storage, None).unwrap();
    common::write(&format, 0, &[8; 65536]);
    assert!(common::read(&format, 65536, 1 << 20) == vec![7; 1 << 20]);
    drop(format);
    std::fs::write(&image, storage.bytes()).unwrap();
    check(&image);
    assert!(qemu_contents(dir.path(), &image, None)[..65536] == [8; 65536]);
}

#[test]
fn counts_are_written_when_the_images_of_a_graph_are_closed() {
    if !have_qemu_img("lazy and a graph") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = create(dir.path(), "a.qcow2", "4M", "lazy_refcounts=on");
    let (graph, node) = common::open(&file);
    node.write(0, &[block::WriteBuf::new(&[1; 70_000])]).unwrap();
    node.flush().unwrap();
    assert!(is_dirty(&std::fs::read(&file).unwrap()));
    graph.close_images().unwrap();
    // Not only by the end of the last handle, whose errors nobody is told.
    assert!(!is_dirty(&std::fs::read(&file).unwrap()));
    drop((graph, node));
    check(&file);
}
