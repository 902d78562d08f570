//! Flush, and space given back: the tables stay as they are while the disk works, and who only looks at
//! them goes on.
//!
//! ```text
//!   freeze ──> writes of a step, lock held ──> lock let go, file is flushed ──┐
//!                    ▲                                                        │
//!                    └────────────────────────────────────────────────────────┴──> thaw
//! ```
//!
//! The order of [`Meta::sync`] needs tables that do not change between its steps: a new entry must not
//! reach the disk by a step that its data or refcount was too late for. So the tables are frozen, not
//! locked: [`Qcow2::meta`], which all who change something go through, waits for the thaw, while
//! [`Qcow2::meta_to_look`] does not. Reads, and writes to clusters that are there, wait for no flush.
//!
//! Where memory shows a snapshot to which the header does not lead yet (`snapshot/revert.rs`), a flush returns when
//! the headers of all images that went back together do ([`crate::Together`]). If one could not be written, the flush
//! tries it again.
//!
//! Free clusters must not be taken while their space is being given back: the same freeze keeps them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LockResult, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::together::{Follow, Place};
use crate::{Result, Together};

use super::Qcow2;
use super::meta::{Meta, Sync, discard};

/// Flushes ahead of those that requests wait for, and how long one may take for no other to be needed.
const MOST_AHEAD: usize = 5;
const SHORT: Duration = Duration::from_millis(20);
/// How often a walk gives way before its next step: some 0.1 ms where the cores have nothing else to do.
const MOST_YIELDS: u32 = 200;

/// Frozen tables, which this alone may change: thawed when it is dropped, also after a panic. Nothing
/// here may be called with the lock held, nor [`Qcow2::meta`] by who has this.
pub(super) struct Frozen<'a>(&'a Qcow2);

impl Frozen<'_> {
    /// Changes the tables. Those who look come between two steps: each must leave what they may see.
    pub(super) fn step<T>(&self, change: impl FnOnce(&mut Meta) -> T) -> T {
        change(&mut self.0.meta_to_look())
    }

    /// As [`Meta::sync`], without the lock while files are flushed.
    pub(super) fn sync(&self) -> Result<()> {
        let mut sync = Sync::default();
        while let Some(file) = self.step(|meta| sync.step(meta))? {
            file.flush()?;
        }
        Ok(())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.meta_to_look().frozen = false;
        self.0.thawed.notify_all();
    }
}

/// An image's part in a change of several. Dropped, it does not keep the others any more.
#[derive(Debug)]
pub(super) struct Member {
    together: Arc<Together>,
    place: Place,
    settled: bool,
}

impl Member {
    pub(super) fn join(together: &Arc<Together>, image: Weak<Qcow2>) -> Self {
        Self { together: together.clone(), place: together.join(image), settled: false }
    }

    pub(super) fn together(&self) -> &Arc<Together> {
        &self.together
    }

    fn settle(&mut self) {
        if !std::mem::replace(&mut self.settled, true) {
            self.together.followed(self.place);
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.settle();
    }
}

impl Follow for Qcow2 {
    fn follow(&self) -> Result<()> {
        self.flush_alone()
    }
}

impl Qcow2 {
    /// The metadata, to change it or to look at what must not be halfway; waits for a flush.
    pub(super) fn meta(&self) -> MutexGuard<'_, Meta> {
        let meta = self.meta_to_look();
        if !meta.frozen {
            return meta;
        }
        self.waiting(|| self.thawed.wait_while(meta, |meta| meta.frozen))
    }

    /// The metadata, to find out where data is. Nothing but clean tables in the cache, and the mark of a
    /// corrupt image, may be changed.
    pub(super) fn meta_to_look(&self) -> MutexGuard<'_, Meta> {
        self.try_meta_to_look().unwrap_or_else(|| self.waiting(|| self.meta.lock()))
    }

    /// Counts who waits, for [`Qcow2::give_way`].
    fn waiting<'a>(
        &self,
        wait: impl FnOnce() -> LockResult<MutexGuard<'a, Meta>>,
    ) -> MutexGuard<'a, Meta> {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        let meta = wait().unwrap_or_else(PoisonError::into_inner);
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        meta
    }

    /// For who takes the metadata again and again: lets those in who wait for it. The lock goes to who comes first,
    /// which is never who has to be woken.
    pub(super) fn give_way(&self) {
        for _ in 0..MOST_YIELDS {
            std::thread::yield_now();
            if self.waiters.load(Ordering::Relaxed) == 0 {
                return;
            }
        }
    }

    /// Freezes the tables, whose lock the caller has and gives up.
    pub(super) fn freeze<'a>(&'a self, mut meta: MutexGuard<'a, Meta>) -> Frozen<'a> {
        meta.frozen = true;
        drop(meta);
        Frozen(self)
    }

    /// Makes all durable that was completed before, on the images that changed together too.
    pub(super) fn flush_disk(&self) -> Result<()> {
        self.flush_alone()?;
        let Some(together) = self.together() else { return Ok(()) };
        together.wait()?;
        // Another change may have begun meanwhile.
        self.meta().member.take_if(|member| Arc::ptr_eq(&member.together, &together));
        Ok(())
    }

    /// The images that it changed together with, until all are durably changed.
    pub(crate) fn together(&self) -> Option<Arc<Together>> {
        self.meta_to_look().member.as_ref().map(|member| member.together.clone())
    }

    /// As [`Qcow2::flush_disk`], for this image alone.
    pub(super) fn flush_alone(&self) -> Result<()> {
        self.flush_tables()?;
        let mut meta = self.meta();
        // Another may have been shown since.
        if !meta.unsettled
            && let Some(member) = &mut meta.member
        {
            member.settle();
        }
        Ok(())
    }

    fn flush_tables(&self) -> Result<()> {
        let meta = self.meta();
        if !meta.writable {
            return Ok(());
        }
        if !meta.is_dirty() {
            drop(meta);
            if self.geometry.external {
                self.data.flush()?;
            }
            return self.storage.flush();
        }
        let frozen = self.freeze(meta);
        frozen.sync()?;
        let more = frozen.step(|meta| meta.has_freed());
        drop(frozen);
        // What the guest discarded since the last flush may be much.
        if more {
            self.punch_all();
        }
        Ok(())
    }

    /// Makes most durable without keeping requests waiting, which the flushes of a sync do. A flush makes
    /// durable what others wrote meanwhile, too: each here leaves the next less to do, until little is left.
    pub(super) fn flush_ahead(&self) -> Result<()> {
        for _ in 0..MOST_AHEAD {
            self.meta().write_ahead()?;
            let begun = Instant::now();
            if self.geometry.external {
                self.data.flush()?;
            }
            self.storage.flush()?;
            // Whoever took a cluster meanwhile has changed a count.
            if begun.elapsed() < SHORT || !self.meta().refcounts.has_dirty_blocks() {
                break;
            }
        }
        Ok(())
    }

    /// After a change of snapshots: gives space back to the host, the end of the file included.
    pub(super) fn give_space_back(&self) {
        if self.punch_all() {
            self.meta().truncate_tail();
        }
    }

    /// Keeps the list of freed clusters short during a walk that lets requests in between.
    pub(super) fn punch_if_many(&self) {
        if self.meta().has_many_freed() {
            self.punch_all();
        }
    }

    /// Punches out what was freed, letting requests in between; says whether it could.
    fn punch_all(&self) -> bool {
        loop {
            let mut meta = self.meta();
            let parts = match meta.take_freed() {
                Ok(parts) => parts,
                Err(e) => {
                    tracing::warn!(image = self.storage.name(), "space is not given back: {e}");
                    return false;
                }
            };
            let more = meta.has_freed();
            let frozen = self.freeze(meta);
            for part in parts {
                discard(&*self.storage, self.geometry, part);
            }
            drop(frozen);
            if !more {
                return true;
            }
            self.give_way();
        }
    }
}

#[cfg(test)]
mod tests;
