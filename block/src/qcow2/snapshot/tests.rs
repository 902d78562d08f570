//! Requests beside the end of a change, which gives back table by table.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::layout::COPIED;
use crate::qcow2::{Probe, check};
use crate::snapshot::{NewSnapshot, SnapshotChange};
use crate::storage::memory::MemoryStorage;
use crate::{Format, Preallocation, Progress, ReadBuf, Together, WriteBuf};

/// What one L2 table maps, with clusters of 512 bytes.
const TABLE: u64 = 64 * 512;
const TABLES: u64 = 8;

fn open(storage: Arc<MemoryStorage>) -> Arc<Qcow2> {
    Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap().into_shared()
}

fn write(image: &Qcow2, at: u64, byte: u8, disk: &mut [u8]) {
    image.write(at, &[WriteBuf::new(&[byte; 700])]).unwrap();
    disk[usize::try_from(at).unwrap()..][..700].fill(byte);
}

/// The disk of an image, which must be without damage; leaks may be there unless it was closed.
#[track_caller]
fn disk_of(bytes: Vec<u8>, closed: bool) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new(bytes));
    let report = check::check(&*storage, &check::Options::default()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
    assert!(!closed || report.leaks == 0, "{:?}", report.findings);
    let mut disk = vec![9; usize::try_from(TABLES * TABLE).unwrap()];
    open(storage).read(0, &[ReadBuf::new(&mut disk)]).unwrap();
    disk
}

fn new(tag: &str) -> NewSnapshot {
    NewSnapshot { tag: tag.to_owned(), date_sec: 1, date_nsec: 0, vm_clock_nsec: 0 }
}

fn land(mut change: impl SnapshotChange) {
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
}

/// An image with snapshot 2, of which the disk has some tables still and others not; the disk, and that of the
/// snapshot.
fn image() -> (Arc<MemoryStorage>, Vec<u8>, Vec<u8>) {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        size: TABLES * TABLE,
        cluster_size: Some(512),
        preallocation: Some(Preallocation::Metadata),
        ..CreateOptions::default()
    };
    create(&*storage, None, &options, &Progress::default()).unwrap();
    let image = open(storage.clone());
    let mut disk = vec![0; usize::try_from(TABLES * TABLE).unwrap()];
    for table in 0..TABLES {
        write(&image, table * TABLE + 100, 1, &mut disk);
    }
    // The second has the disk's tables: the first took their flags.
    land(Create::begin(&image, &new("s")).unwrap());
    land(Create::begin(&image, &new("t")).unwrap());
    land(Delete::begin(&image, "1").unwrap());
    let saved = disk.clone();
    for table in [0, 3, 4, 7] {
        write(&image, table * TABLE + 5000, 2, &mut disk);
    }
    drop(image);
    (storage, disk, saved)
}

/// Whether the disk has its tables alone.
fn own(image: &Qcow2) -> Vec<bool> {
    image.meta().l1.iter().map(|entry| entry & COPIED != 0).collect()
}

/// Holds the next reads at a place of a file until the sender is dropped; each is told.
fn hold_reads(storage: &MemoryStorage, held: u64) -> (Sender<()>, Receiver<()>) {
    let (begin, begun) = channel();
    let (go, gone) = channel::<()>();
    let gone = Mutex::new(gone);
    storage.before_read(move |at| {
        if at == held {
            // Errors once the test needs no more waiting.
            let _ = begin.send(());
            let _ = gone.lock().unwrap().recv();
        }
    });
    (go, begun)
}

/// Writes where the end of a change has been and where it has not, with flushes and crashes between.
#[track_caller]
fn work(storage: &MemoryStorage, image: &Qcow2, disk: &mut [u8]) {
    for (n, table) in [0, 1, 2, 4, 5, 7].into_iter().enumerate() {
        write(image, table * TABLE + 100, 3, disk);
        write(image, table * TABLE + 5000 + 512, 4, disk);
        if n % 2 == 0 {
            image.flush().unwrap();
            assert_eq!(disk_of(storage.flushed_bytes(), false), disk, "after a crash");
        }
    }
    assert!(image.create_snapshot(&new("u")).is_err(), "one change at a time");
}

/// Nothing of the change is left.
#[track_caller]
fn judge(storage: &MemoryStorage, image: Arc<Qcow2>, disk: &[u8]) {
    image.flush().unwrap();
    assert_eq!(disk_of(storage.flushed_bytes(), false), disk);
    drop(image);
    assert_eq!(disk_of(storage.bytes(), true), disk);
}

#[test]
fn writes_and_flushes_are_let_in_between_the_tables_of_a_snapshot_that_is_deleted() {
    let (storage, mut disk, _) = image();
    // No table is in memory.
    let image = open(storage.clone());
    let mut delete = Delete::begin(&image, "2").unwrap();
    let held = {
        let meta = image.meta();
        table_of(load_l1(&meta, &meta.snapshots[0]).unwrap()[4]).unwrap()
    };
    delete.prepare().unwrap();
    delete.publish().unwrap();
    assert_eq!(own(&image), [true, false, false, true, true, false, false, true]);
    let (go, begun) = hold_reads(&storage, held.0);
    thread::scope(|scope| {
        let finish = scope.spawn(|| delete.finish());
        begun.recv().unwrap();
        assert_eq!(own(&image), [true, true, true, true, true, false, false, true]);
        work(&storage, &image, &mut disk);
        assert!(!finish.is_finished());
        drop(go);
        finish.join().unwrap().unwrap();
    });
    drop(delete);
    judge(&storage, image, &disk);
}

#[test]
fn writes_and_flushes_are_let_in_between_the_tables_of_a_disk_that_was_left() {
    for shown in [false, true] {
        let (storage, _, mut disk) = image();
        let image = open(storage.clone());
        let mut revert = Revert::begin(&image, "2").unwrap();
        let held = table_of(image.meta().l1[4]).unwrap();
        revert.prepare().unwrap();
        if shown {
            revert.show(&Together::new(1)).unwrap();
        }
        revert.publish().unwrap();
        let (go, begun) = hold_reads(&storage, held.0);
        thread::scope(|scope| {
            let finish = scope.spawn(|| revert.finish());
            begun.recv().unwrap();
            work(&storage, &image, &mut disk);
            assert!(!finish.is_finished());
            drop(go);
            finish.join().unwrap().unwrap();
        });
        drop(revert);
        judge(&storage, image, &disk);
    }
}
