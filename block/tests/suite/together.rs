//! Images that go back to a snapshot together, in memory first.

use std::sync::Arc;

use block::qcow2::{Probe, Qcow2};
use block::storage::Storage;
use block::storage::memory::MemoryStorage;
use block::{Error, Format, SnapshotChange, Together};

use crate::common::{self, create, have_qemu_img, id_of, read_all, save};

/// An image with a snapshot of ones, whose disk has twos now.
fn image(name: &str) -> (Arc<MemoryStorage>, Qcow2) {
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), name, "1M", "");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(image).unwrap()));
    let shared: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(shared).unwrap(), None, false).unwrap();
    common::write(&format, 0, &[1; 300_000]);
    save(&format, "old");
    common::write(&format, 0, &[2; 300_000]);
    format.flush().unwrap();
    (storage, format)
}

/// Where the header on disk says that the L1 table is.
fn durable_l1(storage: &MemoryStorage) -> Vec<u8> {
    storage.flushed_bytes()[40..48].to_vec()
}

fn shown<'a>(formats: [&'a Qcow2; 2]) -> [Box<dyn SnapshotChange + 'a>; 2] {
    let together = Together::new(2);
    formats.map(|format| {
        let mut change = format.revert_snapshot(&id_of(format, "old")).unwrap();
        change.prepare().unwrap();
        change.show(&together).unwrap();
        assert!(read_all(format)[..300_000].iter().all(|byte| *byte == 1));
        change as Box<dyn SnapshotChange + 'a>
    })
}

#[test]
fn a_flush_of_one_shown_image_returns_when_the_other_is_durable_too() {
    if !have_qemu_img("images together") {
        return;
    }
    let ((a_file, a), (b_file, b)) = (image("a.qcow2"), image("b.qcow2"));
    let [mut a_change, mut b_change] = shown([&a, &b]);
    let (a_old, b_old) = (durable_l1(&a_file), durable_l1(&b_file));
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| {
            common::write(&a, 0, &[3; 512]);
            a.flush().unwrap();
            assert_ne!(durable_l1(&b_file), b_old, "the other disk could be lost");
        });
        while durable_l1(&a_file) == a_old {
            std::thread::yield_now();
        }
        b_change.publish().unwrap();
        flush.join().unwrap();
    });
    a_change.publish().unwrap();
    a_change.finish().unwrap();
    b_change.finish().unwrap();
    a.flush().unwrap();
    assert_eq!(read_all(&a)[..513], [vec![3; 512], vec![1]].concat());
}

#[test]
fn flushes_fail_while_the_other_image_could_not_follow_and_work_when_it_has() {
    if !have_qemu_img("images together") {
        return;
    }
    let ((_, a), (b_file, b)) = (image("a.qcow2"), image("b.qcow2"));
    let [mut a_change, mut b_change] = shown([&a, &b]);
    b_file.fail_after(Some(0), false);
    b_change.publish().unwrap_err();
    a_change.publish().unwrap();
    a_change.finish().unwrap();
    assert!(matches!(a.flush(), Err(Error::Apart)));
    b_file.fail_after(None, false);
    drop(b_change);
    b.flush().unwrap();
    a.flush().unwrap();
    assert!(read_all(&b)[..300_000].iter().all(|byte| *byte == 1), "what a guest saw stays");
}

#[test]
fn a_flush_of_one_image_makes_up_for_another_that_could_not_follow() {
    if !have_qemu_img("images together") {
        return;
    }
    let ((_, a), (b_file, b)) = (image("a.qcow2"), image("b.qcow2"));
    let (a, b) = (a.into_shared(), b.into_shared());
    let [mut a_change, mut b_change] = shown([&a, &b]);
    let b_old = durable_l1(&b_file);
    b_file.fail_after(Some(0), false);
    b_change.publish().unwrap_err();
    a_change.publish().unwrap();
    a_change.finish().unwrap();
    drop((a_change, b_change));
    for _ in 0..2 {
        assert!(matches!(a.flush(), Err(Error::Apart)), "it still cannot be written");
    }
    b_file.fail_after(None, false);
    std::thread::scope(|scope| {
        let flushes: Vec<_> = (0..4).map(|_| scope.spawn(|| a.flush())).collect();
        flushes.into_iter().for_each(|flush| flush.join().unwrap().unwrap());
    });
    assert_ne!(durable_l1(&b_file), b_old, "nobody has flushed it");
    assert!(read_all(&*b)[..300_000].iter().all(|byte| *byte == 1), "what a guest saw stays");
    // One that is closed keeps nobody from flushing.
    let [mut a_change, mut b_change] = shown([&a, &b]);
    b_file.fail_after(Some(0), false);
    b_change.publish().unwrap_err();
    a_change.publish().unwrap();
    a_change.finish().unwrap();
    drop((a_change, b_change));
    drop(b);
    a.flush().unwrap();
}

#[test]
fn a_rolled_back_image_keeps_no_flush_of_the_other() {
    if !have_qemu_img("images together") {
        return;
    }
    let ((_, a), (_, b)) = (image("a.qcow2"), image("b.qcow2"));
    let [mut a_change, mut b_change] = shown([&a, &b]);
    b_change.rollback().unwrap();
    assert!(read_all(&b)[..300_000].iter().all(|byte| *byte == 2));
    a_change.publish().unwrap();
    a_change.finish().unwrap();
    a.flush().unwrap();
}
