//! Deleting a snapshot.
//!
//! prepare: the table without it, written to fresh clusters, durable.
//! publish: one header write.
//! finish:  references of the snapshot's tree are given back, table by table with requests let in between; the old
//!          snapshot table is freed.

use crate::num::to_u64;
use crate::qcow2::Qcow2;
use crate::qcow2::meta::Meta;
use crate::snapshot::SnapshotChange;
use crate::{Error, Result};

use super::table::{Entry, TableSwitch};
use super::{Stage, begin_change, find, l1_run, load_l1, tree};

/// Bytes of tables that are made durable ahead of the flush that requests wait for.
const MANY: u64 = 1 << 20;

/// A deletion that is under way; the module has the steps.
pub(in crate::qcow2) struct Delete<'a> {
    image: &'a Qcow2,
    entry: Entry,
    l1: Vec<u64>,
    switch: Option<TableSwitch>,
    stage: Stage,
}

impl<'a> Delete<'a> {
    /// Starts the deletion of snapshot `id`.
    pub(crate) fn begin(image: &'a Qcow2, id: &str) -> Result<Self> {
        let (entry, l1) = begin_change(image, |meta| {
            let entry = find(meta, id)?;
            check_unread(meta, &entry)?;
            let l1 = load_l1(meta, &entry)?;
            Ok((entry, l1))
        })?;
        Ok(Self { image, entry, l1, switch: None, stage: Stage::Begun })
    }

    /// Whether a flush of as many tables as the snapshot has takes a while.
    fn has_many_tables(&self) -> bool {
        let tables = to_u64(self.l1.iter().filter(|entry| **entry != 0).count());
        self.image.geometry.bytes_of(tables) > MANY
    }
}

/// Refuses a snapshot whose VM state is open.
fn check_unread(meta: &Meta, entry: &Entry) -> Result<()> {
    if meta.readers.contains(&entry.info.id) {
        return Err(Error::Invalid(format!(
            "Snapshot '{}' is in use: its VM state is being read",
            entry.info.tag
        )));
    }
    Ok(())
}

impl SnapshotChange for Delete<'_> {
    fn prepare(&mut self) -> Result<()> {
        self.stage.expect(Stage::Begun)?;
        let dirty = {
            let meta = self.image.meta();
            meta.check_writable()?;
            meta.is_dirty()
        };
        if dirty {
            self.image.flush_ahead()?;
        }
        let mut meta = self.image.meta();
        meta.check_writable()?;
        let mut rest = meta.snapshots.clone();
        // Only the one: a broken image may have an id twice.
        if let Some(at) = rest.iter().position(|entry| *entry == self.entry) {
            rest.remove(at);
        }
        self.switch = Some(TableSwitch::write(&mut meta, rest)?);
        self.image.freeze(meta).sync()?;
        self.stage = Stage::Prepared;
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Prepared)?;
        let mut meta = self.image.meta();
        // Somebody may have opened it since; afterwards nobody finds it any more.
        check_unread(&meta, &self.entry)?;
        if let Some(switch) = &mut self.switch {
            switch.publish(&mut meta)?;
        }
        self.stage = Stage::Published;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stage.expect(Stage::Published)?;
        self.stage = Stage::Ended;
        let image = self.image;
        let freed = tree::unshare_by_table(image, &self.l1);
        let (freed, table) = {
            let mut meta = image.meta();
            // As long as a table is left, its L1 table tells where.
            let run = l1_run(&meta, &self.entry);
            let freed = freed.and_then(|()| meta.free(run));
            (freed, self.switch.as_mut().map_or(Ok(()), |switch| switch.finish(&mut meta)))
        };
        // The tables that moved may be much to flush.
        let ahead = if self.has_many_tables() { image.flush_ahead() } else { Ok(()) };
        let mut meta = image.meta();
        // No other change begins before all is given back.
        meta.changing = false;
        let synced = image.freeze(meta).sync();
        image.give_space_back();
        freed.and(table).and(ahead).and(synced)
    }

    fn rollback(&mut self) -> Result<()> {
        if self.stage == Stage::Ended {
            return Ok(());
        }
        self.stage = Stage::Ended;
        let mut meta = self.image.meta();
        meta.changing = false;
        if let Some(switch) = &mut self.switch {
            switch.undo(&mut meta)?;
            meta.sync()?;
            meta.truncate_tail();
        }
        Ok(())
    }
}

impl Drop for Delete<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.rollback() {
            tracing::error!("deletion of a snapshot was not undone wholly: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};
    use std::thread;

    use super::*;
    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::layout::{COPIED, table_of};
    use crate::qcow2::{Probe, check};
    use crate::snapshot::NewSnapshot;
    use crate::storage::memory::MemoryStorage;
    use crate::{Format, Preallocation, Progress, ReadBuf, WriteBuf};

    /// What one L2 table maps, with clusters of 512 bytes.
    const TABLE: u64 = 64 * 512;
    const TABLES: u64 = 8;

    fn open(storage: Arc<MemoryStorage>) -> Qcow2 {
        Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap()
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

    fn save(image: &Qcow2, tag: &str) {
        let mut save = image.create_snapshot(&new(tag)).unwrap();
        save.prepare().unwrap();
        save.publish().unwrap();
        save.finish().unwrap();
    }

    fn new(tag: &str) -> NewSnapshot {
        NewSnapshot { tag: tag.to_owned(), date_sec: 1, date_nsec: 0, vm_clock_nsec: 0 }
    }

    /// An image with snapshot 2, of which the disk has some tables still and others not, and its disk.
    fn image() -> (Arc<MemoryStorage>, Vec<u8>) {
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
        save(&image, "s");
        save(&image, "t");
        let mut first = Delete::begin(&image, "1").unwrap();
        first.prepare().unwrap();
        first.publish().unwrap();
        first.finish().unwrap();
        drop(first);
        for table in [0, 3, 4, 7] {
            write(&image, table * TABLE + 5000, 2, &mut disk);
        }
        drop(image);
        (storage, disk)
    }

    #[test]
    fn writes_and_flushes_are_let_in_between_the_tables_of_a_snapshot_that_is_deleted() {
        let (storage, mut disk) = image();
        // No table is in memory.
        let image = open(storage.clone());
        let mut delete = Delete::begin(&image, "2").unwrap();
        delete.prepare().unwrap();
        delete.publish().unwrap();
        let held = table_of(delete.l1[4]).unwrap().0;
        let own = || image.meta().l1.iter().map(|entry| entry & COPIED != 0).collect::<Vec<_>>();
        assert_eq!(own(), [true, false, false, true, true, false, false, true]);

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
        thread::scope(|scope| {
            let finish = scope.spawn(|| delete.finish());
            begun.recv().unwrap();
            assert_eq!(own(), [true, true, true, true, true, false, false, true]);
            // Where counts went down already, and where they have not.
            for (n, table) in [0, 1, 2, 4, 5, 7].into_iter().enumerate() {
                write(&image, table * TABLE + 100, 3, &mut disk);
                write(&image, table * TABLE + 5000 + 512, 4, &mut disk);
                if n % 2 == 0 {
                    image.flush().unwrap();
                    assert_eq!(disk_of(storage.flushed_bytes(), false), disk, "after a crash");
                }
            }
            assert!(!finish.is_finished());
            assert!(image.create_snapshot(&new("u")).is_err(), "one change at a time");
            drop(go);
            finish.join().unwrap().unwrap();
        });
        drop(delete);
        image.flush().unwrap();
        assert_eq!(disk_of(storage.flushed_bytes(), false), disk);
        drop(image);
        assert_eq!(disk_of(storage.bytes(), true), disk);
    }
}
