//! Who waits for a flush, and who does not.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::{Options, Probe};
use crate::queue::Located;
use crate::snapshot::NewSnapshot;
use crate::storage::memory::MemoryStorage;
use crate::{Format, Progress, ReadBuf, WriteBuf};

const CLUSTER: u64 = 65536;

fn image() -> (Arc<MemoryStorage>, Qcow2) {
    let storage = Arc::new(MemoryStorage::new(Vec::new()));
    let options = CreateOptions { size: 64 * CLUSTER, ..CreateOptions::default() };
    create(&*storage, None, &options, &Progress::default()).unwrap();
    let probe = Probe::new(storage.clone()).unwrap();
    (storage, Qcow2::open_with(probe, None, Options::default()).unwrap())
}

#[test]
fn reads_and_writes_in_place_do_not_wait_for_a_flush_and_new_clusters_do() {
    let (storage, image) = image();
    image.write(0, &[WriteBuf::new(&[1; 512])]).unwrap();
    let (begin, begun) = channel();
    let (go, gone) = channel::<()>();
    let gone = Mutex::new(gone);
    storage.before_flush(move || {
        // An error when the test is over and the image closes.
        let _ = begin.send(());
        // An error when the test needs no more waiting.
        let _ = gone.lock().unwrap().recv();
    });
    thread::scope(|scope| {
        let flush = scope.spawn(|| image.flush());
        begun.recv().unwrap();
        assert_eq!(read(&image, 0), [1; 512]);
        let mut located = Located::default();
        assert!(image.locate_read(0, 512, &mut located));
        located.clear();
        assert!(image.locate_write(0, 512, &mut located), "in place");
        located.clear();
        image.write(512, &[WriteBuf::new(&[2; 512])]).unwrap();
        assert_eq!(read(&image, 512), [2; 512]);
        assert!(!image.locate_write(CLUSTER, 512, &mut located), "a new cluster");
        assert!(!located.conflict && image.try_meta().is_none());
        let other = scope.spawn(|| image.write(CLUSTER, &[WriteBuf::new(&[7; 512])]));
        // Between the steps too.
        go.send(()).unwrap();
        begun.recv().unwrap();
        assert_eq!(read(&image, 0), [1; 512]);
        assert!(!other.is_finished() && !flush.is_finished());
        drop(go);
        flush.join().unwrap().unwrap();
        other.join().unwrap().unwrap();
    });
    assert_eq!(read(&image, CLUSTER), [7; 512]);
    // Nothing is left frozen after a flush that fails.
    storage.fail_after(Some(0), true);
    image.flush().unwrap_err();
    image.flush().unwrap();
    image.write(2 * CLUSTER, &[WriteBuf::new(&[8; 512])]).unwrap();
}

fn read(image: &Qcow2, at: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    image.read(at, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

#[test]
fn the_lock_is_free_at_every_flush_of_a_save_its_rollback_and_a_deletion() {
    let (storage, image) = image();
    let image = Arc::new(image);
    image.write(0, &[WriteBuf::new(&vec![1; 20 << 16])]).unwrap();
    let flushes = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let (watched, counts) = (Arc::downgrade(&image), flushes.clone());
    storage.before_flush(move || {
        // Nobody else uses the image: who has the lock is who flushes.
        if let Some(image) = watched.upgrade() {
            let free = image.try_meta_to_look().is_some();
            counts[usize::from(free)].fetch_add(1, Ordering::Relaxed);
        }
    });
    let all_free = |what: &str| {
        let [held, free] = [0, 1].map(|n| flushes[n].swap(0, Ordering::Relaxed));
        assert!(held == 0 && free > 0, "{what}: {held} flushes with the lock, {free} without");
    };
    let new = NewSnapshot { tag: "s".to_owned(), date_sec: 1, date_nsec: 0, vm_clock_nsec: 0 };
    for published in [false, true] {
        let mut save = image.create_snapshot(&new).unwrap();
        save.switch().unwrap();
        image.write(CLUSTER, &[WriteBuf::new(&[2; 512])]).unwrap();
        save.prepare().unwrap();
        all_free("preparation");
        if published {
            save.publish().unwrap();
            save.finish().unwrap();
        } else {
            save.rollback().unwrap();
            all_free("rollback");
        }
    }
    let id = image.snapshots()[0].id.clone();
    image.flush().unwrap();
    flushes.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    let mut delete = image.delete_snapshot(&id).unwrap();
    delete.prepare().unwrap();
    all_free("preparation of a deletion");
    delete.publish().unwrap();
    flushes.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    delete.finish().unwrap();
    all_free("end of a deletion");
    drop(delete);
    assert_eq!(read(&image, CLUSTER), [2; 512]);
}
