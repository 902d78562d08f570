//! Interleavings that only a storage which holds a request back can bring about.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use block::qcow2::{Probe, Qcow2};
use block::storage::Storage;
use block::storage::memory::MemoryStorage;
use block::{Format, Preallocation, Progress, ReadBuf, Result, WriteBuf};

use crate::common::{self, create, have_qemu_img, land, save};

/// Memory whose next write past the end waits until the length is asked for, and is then done before
/// the answer (which is of before) is given. With `after_len` an answer waits for whoever else.
#[derive(Debug)]
struct LateWrite {
    memory: MemoryStorage,
    hold: AtomicBool,
    release: AtomicBool,
    after_len: AtomicBool,
    held: Barrier,
    go: Barrier,
    done: Barrier,
}

impl LateWrite {
    fn new(bytes: Vec<u8>) -> Self {
        let barrier = || Barrier::new(2);
        Self {
            memory: MemoryStorage::new(bytes),
            hold: AtomicBool::new(false),
            release: AtomicBool::new(false),
            after_len: AtomicBool::new(false),
            held: barrier(),
            go: barrier(),
            done: barrier(),
        }
    }
}

impl Storage for LateWrite {
    fn name(&self) -> &str {
        "late"
    }
    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.memory.read_at(offset, bufs)
    }
    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        if offset < self.memory.len()? || !self.hold.swap(false, Ordering::AcqRel) {
            return self.memory.write_at(offset, bufs);
        }
        self.held.wait();
        self.go.wait();
        let result = self.memory.write_at(offset, bufs);
        self.done.wait();
        result
    }
    fn flush(&self) -> Result<()> {
        self.memory.flush()
    }
    fn len(&self) -> Result<u64> {
        let len = self.memory.len();
        let release = self.release.swap(false, Ordering::AcqRel);
        if release || self.after_len.swap(false, Ordering::AcqRel) {
            self.go.wait();
            self.done.wait();
        }
        len
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.memory.set_len(len)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.memory.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.memory.write_zeroes(offset, len, unmap)
    }
    fn allocated(&self) -> Result<u64> {
        self.memory.allocated()
    }
    fn read_only(&self) -> bool {
        false
    }
}

/// A write in flight goes to a cluster past the end of the file while the deletion of a snapshot
/// shortens the file.
#[test]
fn shortening_the_file_leaves_a_write_in_flight_alone() {
    if !have_qemu_img("late write") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let storage = Arc::new(LateWrite::new(std::fs::read(&image).unwrap()));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
    // Holes for the L2 table, so that only data goes past the end; VM state at the end.
    for tag in ["low", "high"] {
        let mut change = format.create_snapshot(&common::new_snapshot(tag)).unwrap();
        change.write_vmstate(0, &[WriteBuf::new(&[1; 4 << 16])]).unwrap();
        change.set_vmstate_size(4 << 16);
        change.prepare().unwrap();
        change.publish().unwrap();
        change.finish().unwrap();
    }
    common::delete(&format, "low");
    common::write(&format, 0, &[6; 1 << 16]);
    format.flush().unwrap();
    let mut change = format.delete_snapshot("2").unwrap();
    change.prepare().unwrap();
    change.publish().unwrap();
    storage.hold.store(true, Ordering::Release);
    std::thread::scope(|scope| {
        scope.spawn(|| common::write(&format, 1 << 20, &vec![7; 1 << 20]));
        storage.held.wait();
        storage.release.store(true, Ordering::Release);
        change.finish().unwrap();
    });
    drop(change);
    assert!(common::read(&format, 1 << 20, 1 << 20).iter().all(|b| *b == 7));
    drop(format);
    std::fs::write(&image, storage.memory.bytes()).unwrap();
    common::check(&image);
}

/// A write in flight past the end of the file while a growing disk gets clusters there.
#[test]
fn taking_clusters_for_a_growing_disk_leaves_a_write_in_flight_alone() {
    if !have_qemu_img("late write and growth") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let storage = Arc::new(LateWrite::new(std::fs::read(&image).unwrap()));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
    common::write(&format, 0, &[6; 1 << 16]);
    format.flush().unwrap();
    std::thread::scope(|scope| {
        // The disk's growth takes its clusters first, and is held by the first look at the length.
        storage.after_len.store(true, Ordering::Release);
        let growth = scope.spawn(|| {
            format.resize(16 << 20, Preallocation::Metadata, &Progress::default()).unwrap();
        });
        storage.go.wait();
        common::write(&format, 1 << 20, &vec![7; 1 << 20]);
        storage.done.wait();
        growth.join().unwrap();
    });
    assert!(common::read(&format, 1 << 20, 1 << 20).iter().all(|b| *b == 7));
    drop(format);
    std::fs::write(&image, storage.memory.bytes()).unwrap();
    common::check(&image);
}

#[test]
fn vm_state_opened_while_its_snapshot_is_being_deleted_keeps_the_snapshot() {
    if !have_qemu_img("reader") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let (graph, node) = common::open(&image);
    let image_format = node.format();
    let format = &*image_format;
    save(format, "s");
    let mut change = format.delete_snapshot("1").unwrap();
    let reader = format.open_vmstate("1").unwrap();
    let error = land(&mut *change).unwrap_err().to_string();
    assert!(error.contains("its VM state is being read"), "{error}");
    drop(change);
    drop(reader);
    assert_eq!(format.snapshots().len(), 1);
    common::delete(format, "s");
    drop((graph, node, image_format));
    common::check(&image);
}
