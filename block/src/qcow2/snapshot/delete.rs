//! Deleting a snapshot.
//!
//! prepare: the table without it, written to fresh clusters, durable.
//! publish: one header write.
//! finish:  references of the snapshot's tree are given back, table by table with requests let in between; the old
//!          snapshot table is freed.

use crate::qcow2::Qcow2;
use crate::qcow2::meta::Meta;
use crate::snapshot::SnapshotChange;
use crate::{Error, Result};

use super::table::{Entry, TableSwitch};
use super::{Stage, begin_change, find, flush_ahead_of, l1_run, load_l1, tree};

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
        let ahead = flush_ahead_of(image, &self.l1);
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
