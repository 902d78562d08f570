//! How changes of the metadata reach the disk, in the order that [`super`] describes, and what is given
//! back afterwards.

use std::sync::Arc;
use std::time::Instant;

use crate::num::{be_bytes, to_u64};
use crate::qcow2::header::{field, incompatible};
use crate::qcow2::snapshot;
use crate::storage::Storage;
use crate::{Result, WriteBuf};

use super::Meta;

/// Clusters waiting to be given back before a sync is due.
const MAX_PENDING_RUNS: usize = 4096;

/// A [`Meta::sync`] under way: writes by turns with flushes, which need no lock. Between its steps
/// nobody else may change the tables.
#[derive(Debug, Default)]
pub(crate) struct Sync {
    next: Step,
}

/// What comes next, numbered as in the order of [`super`].
#[derive(Debug, Default)]
enum Step {
    /// An external data file's flush, before any table refers to what is in it.
    #[default]
    Data,
    /// 1 and 2; for a switch, all that it writes before the header.
    Counts,
    /// A switch's header.
    Header,
    Switched,
    /// 3, the L2 tables.
    Tables,
    /// 3, the L1 table, and 4.
    L1,
    /// 5.
    GiveBack,
    End,
}

impl Sync {
    /// Makes the next writes, and says which file is to be flushed after them. `None`: all is done.
    pub(crate) fn step(&mut self, meta: &mut Meta) -> Result<Option<Arc<dyn Storage>>> {
        loop {
            match self.next {
                Step::Data => {
                    self.next = Step::Counts;
                    if let Some(data) = &meta.data {
                        return Ok(Some(data.clone()));
                    }
                }
                Step::Counts if !meta.has_changes() => {
                    self.next = Step::End;
                    return Ok(Some(meta.storage.clone()));
                }
                Step::Counts => {
                    self.next = if meta.write_first()? { Step::Header } else { Step::Tables };
                    return Ok(Some(meta.storage.clone()));
                }
                Step::Header => {
                    meta.adopt_switch();
                    meta.write_places()?;
                    self.next = Step::Switched;
                    return Ok(Some(meta.storage.clone()));
                }
                Step::Switched => {
                    meta.unsettled = false;
                    // A switch has made all durable that it wrote.
                    let more = meta.l2.is_dirty() || meta.l1_dirty.is_some();
                    self.next = if more { Step::Tables } else { Step::GiveBack };
                }
                Step::Tables => {
                    meta.l2.write_back(&*meta.storage)?;
                    self.next = Step::L1;
                    if meta.l1_dirty.is_some() {
                        // An entry must not lead to a table that is not there.
                        return Ok(Some(meta.storage.clone()));
                    }
                }
                Step::L1 => {
                    meta.write_l1()?;
                    self.next = Step::GiveBack;
                    return Ok(Some(meta.storage.clone()));
                }
                Step::GiveBack => {
                    self.next = Step::End;
                    meta.give_back_pending()?;
                }
                Step::End => return Ok(None),
            }
        }
    }
}

impl Meta {
    /// Whether [`Meta::trim`] has something to do.
    pub(crate) fn needs_trim(&self) -> bool {
        self.refcounts.needs_trim() || self.l2.is_over() || self.pending_runs() > MAX_PENDING_RUNS
    }

    /// Whether anything in memory differs from the disk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.unsettled
            || self.flags_lag
            || self.is_switching()
            || self.refcounts.is_dirty()
            || self.l2.is_dirty()
            || self.l1_dirty.is_some()
            || self.pending_runs() > 0
    }

    /// Writes all changes in the module's order; all of them, and the guest's data, are durable
    /// afterwards. A failure leaves what is unwritten in memory, to be tried again.
    ///
    /// In an image that was found corrupt this saves the writes from before: all tables in memory
    /// are in places that were checked. Nothing is given back any more, as counts may be wrong.
    pub(crate) fn sync(&mut self) -> Result<()> {
        let mut sync = Sync::default();
        while let Some(file) = sync.step(self)? {
            file.flush()?;
        }
        Ok(())
    }

    /// Step 1 of the order; says whether tables are being switched.
    fn write_first(&mut self) -> Result<bool> {
        self.settle()?;
        if std::mem::take(&mut self.flags_lag)
            && self.broken.is_none()
            && let Err(e) = snapshot::set_copied(self)
        {
            tracing::warn!(image = self.storage.name(), "clusters are not marked as ours: {e}");
        }
        if self.is_switching() {
            return self.write_switch().map(|()| true);
        }
        self.write_counts().map(|()| false)
    }

    /// Step 5 of the order.
    fn give_back_pending(&mut self) -> Result<()> {
        if self.broken.is_some() {
            self.pending = Default::default();
            return Ok(());
        }
        let mut lists = std::mem::take(&mut self.pending).map(Vec::into_iter);
        for (list, pass) in [(0, true), (1, false)] {
            while let Some(run) = lists[list].next() {
                if let Err(e) = self.free_passing(run, pass) {
                    // Of this one a part may be given back; the next sync goes on behind it.
                    self.pending = lists.map(Iterator::collect);
                    return Err(e);
                }
            }
        }
        self.punch_if_many()?;
        if self.changing {
            // A guest may be paused for a change of the snapshots, which does the rest at its end.
            return Ok(());
        }
        // No order is needed: on disk these clusters just look used until then.
        self.write_counts()?;
        self.punch_some().map(|_| ())
    }

    /// Whether a [`Meta::sync`] has anything to write. Counts that may be written later are no reason.
    fn has_changes(&self) -> bool {
        let counts = self.refcounts.is_dirty() && !(self.lazy && self.is_marked_dirty());
        counts
            || self.is_switching()
            || self.unsettled
            || self.flags_lag
            || self.l2.is_dirty()
            || self.l1_dirty.is_some()
            || self.pending_runs() > 0
    }

    fn is_marked_dirty(&self) -> bool {
        self.header.incompatible & incompatible::DIRTY != 0
    }

    /// Step 1 of the order. With lazy refcounts they stay in memory: instead, the dirty bit is set
    /// durably before any table refers to a cluster that is not counted on disk. Whoever opens the
    /// image for writing after a crash counts anew.
    fn write_counts(&mut self) -> Result<()> {
        if !self.lazy || self.is_switching() {
            return self.put_counts();
        }
        if self.refcounts.is_dirty() && !self.is_marked_dirty() {
            let bits = self.header.incompatible | incompatible::DIRTY;
            self.write_field(field::INCOMPATIBLE, &bits.to_be_bytes())?;
            self.storage.flush()?;
            self.header.incompatible = bits;
        }
        Ok(())
    }

    /// Writes counts, durably if tables are switched with them.
    pub(crate) fn put_counts(&mut self) -> Result<()> {
        self.settle()?;
        if self.is_switching() { self.switch() } else { self.refcounts.write_back() }
    }

    /// Writes all that is left and takes the dirty bit back. Order: counts durable, then the bit. An
    /// image that was found corrupt keeps it.
    pub(crate) fn close(&mut self) -> Result<()> {
        let lazy = std::mem::replace(&mut self.lazy, false);
        let result = self.close_counted();
        // Until all is written, later writes go on as before.
        self.lazy = lazy;
        result
    }

    fn close_counted(&mut self) -> Result<()> {
        if self.is_dirty() {
            self.sync()?;
        }
        if self.has_freed() && self.broken.is_none() {
            while self.punch_some()? {}
            self.truncate_tail();
        }
        if self.is_marked_dirty() && self.writable && self.broken.is_none() {
            self.storage.flush()?;
            let bits = self.header.incompatible & !incompatible::DIRTY;
            self.write_field(field::INCOMPATIBLE, &bits.to_be_bytes())?;
            self.storage.flush()?;
            self.header.incompatible = bits;
        }
        Ok(())
    }

    /// The last part of step 3 of the order.
    fn write_l1(&mut self) -> Result<()> {
        if let Some(range) = self.l1_dirty.clone() {
            let bytes = be_bytes(&self.l1[range.clone()]);
            let at = self.header.l1_offset + to_u64(range.start) * 8;
            self.storage.write_at(at, &[WriteBuf::new(&bytes)])?;
            self.l1_dirty = None;
        }
        Ok(())
    }

    /// Drops tables that were not used for the interval of `cache-clean-interval`.
    fn clean_caches(&mut self) {
        if let Some(interval) = self.clean_interval
            && self.cleaned.elapsed() >= interval
        {
            self.cleaned = Instant::now();
            self.l2.drop_unused();
            self.refcounts.drop_unused();
        }
    }

    /// As [`Meta::trim`] for reads, which neither wait for writes nor fail with them: what is dirty
    /// stays until something is written.
    pub(crate) fn trim_clean(&mut self) {
        self.clean_caches();
        if self.l2.is_over() {
            self.l2.shrink();
        }
    }

    /// Writes ahead of a sync what may be written at any time: counts, and tables to which nothing on disk
    /// refers. Not made durable.
    pub(crate) fn write_ahead(&mut self) -> Result<()> {
        self.refcounts.write_blocks()?;
        self.l2.write_fresh(&*self.storage)
    }

    /// As [`Meta::trim`] for a walk that makes new tables, which need no sync.
    pub(crate) fn trim_new(&mut self) -> Result<()> {
        if self.l2.is_over() {
            self.l2.write_fresh(&*self.storage)?;
            self.l2.shrink();
        }
        self.refcounts.trim()
    }

    /// Between operations: keeps caches and the list of clusters to be freed within their limits.
    pub(crate) fn trim(&mut self) -> Result<()> {
        self.clean_caches();
        self.refcounts.trim()?;
        if self.l2.is_over() {
            self.l2.shrink();
        }
        if (self.l2.is_over() || self.pending_runs() > MAX_PENDING_RUNS) && self.writable {
            self.sync()?;
            self.l2.shrink();
        }
        Ok(())
    }
}
