//! Tables of one cluster each (L2 tables, refcount blocks) kept in memory, written back later.
//!
//! Which tables are dirty is known without looking at all of them, and what is dropped is found by a
//! clock: clean tables wait in a queue, one that was used since it came to its head goes to the end
//! once more. So what an operation costs does not depend on how many tables there are.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::num::{be64, to_u64, to_usize};
use crate::storage::Storage;
use crate::{ReadBuf, Result, WriteBuf};

use super::layout::HostOffset;

/// The offsets of the tables that differ from the disk.
#[derive(Debug, Clone, Default)]
struct DirtySet(Arc<Mutex<BTreeSet<HostOffset>>>);

impl DirtySet {
    fn get(&self) -> MutexGuard<'_, BTreeSet<HostOffset>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A table as it shall be on disk.
#[derive(Debug)]
pub(super) struct Table {
    offset: HostOffset,
    bytes: Vec<u8>,
    /// Bytes that differ from the disk; `all` has the offset then.
    dirty: Option<Range<usize>>,
    all: DirtySet,
    /// Nothing on disk refers to it, and it was never written: its place may be written at any time.
    fresh: bool,
    /// Used since the clock's hand was here.
    used: bool,
    /// Whether it waits in the clock's queue. Dirty ones need not.
    queued: bool,
    /// Words of 64 bits of an entry.
    words: usize,
}

impl Table {
    /// The table's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Changes bytes in `range`.
    pub(crate) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        self.dirty = Some(match self.dirty.take() {
            Some(old) => old.start.min(range.start)..old.end.max(range.end),
            None => {
                self.all.get().insert(self.offset);
                range.clone()
            }
        });
        &mut self.bytes[range]
    }

    /// Entry of a table of big-endian u64, the first word if it has two.
    pub(crate) fn entry(&self, index: u64) -> u64 {
        be64(&self.bytes, to_usize(index) * self.words)
    }

    /// The second word of an extended L2 entry; 0 for others.
    pub(crate) fn bitmap(&self, index: u64) -> u64 {
        if self.words == 1 { 0 } else { be64(&self.bytes, to_usize(index) * 2 + 1) }
    }

    /// Sets an entry of a table of big-endian u64; the second word stays.
    pub(crate) fn set_entry(&mut self, index: u64, value: u64) {
        let at = to_usize(index) * self.words * 8;
        self.bytes_mut(at..at + 8).copy_from_slice(&value.to_be_bytes());
    }

    /// Sets an entry with its bitmap, which entries of one word do not have.
    pub(crate) fn set_both(&mut self, index: u64, (entry, bitmap): (u64, u64)) {
        self.set_entry(index, entry);
        if self.words == 2 {
            let at = to_usize(index) * 16 + 8;
            self.bytes_mut(at..at + 8).copy_from_slice(&bitmap.to_be_bytes());
        }
    }
}

/// The tables in memory, by host offset. The limit is soft: one operation may go over it, and
/// [`TableCache::shrink`] between operations brings it back.
#[derive(Debug)]
pub(super) struct TableCache {
    tables: HashMap<HostOffset, Table>,
    /// Clean tables in the order in which the clock looks at them, and some that are gone or dirty.
    queue: VecDeque<HostOffset>,
    dirty: DirtySet,
    table_len: usize,
    limit: usize,
    words: usize,
}

/// Fewest tables, however small the limit: what one operation needs at a time.
const FEWEST: u64 = 8;

impl TableCache {
    /// A cache of about `bytes` bytes for tables of `table_len` bytes.
    pub(crate) fn new(table_len: u64, bytes: u64) -> Self {
        Self {
            tables: HashMap::new(),
            queue: VecDeque::new(),
            dirty: DirtySet::default(),
            table_len: to_usize(table_len),
            limit: to_usize((bytes / table_len).max(FEWEST)),
            words: 1,
        }
    }

    /// As it is, for tables whose entries have `words` words.
    pub(crate) fn with_entry_words(mut self, words: usize) -> Self {
        self.words = words;
        self
    }

    /// The table at `offset`, read if it is not here.
    pub(crate) fn load(&mut self, storage: &dyn Storage, offset: HostOffset) -> Result<&mut Table> {
        use std::collections::hash_map::Entry;
        let table = match self.tables.entry(offset) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut bytes = vec![0; self.table_len];
                storage.read_at(offset.0, &[ReadBuf::new(&mut bytes)])?;
                self.queue.push_back(offset);
                entry.insert(Table {
                    offset,
                    bytes,
                    dirty: None,
                    all: self.dirty.clone(),
                    fresh: false,
                    used: false,
                    queued: true,
                    words: self.words,
                })
            }
        };
        table.used = true;
        Ok(table)
    }

    /// Puts a new table at `offset`, where nothing on disk refers to, wholly dirty.
    pub(crate) fn insert(&mut self, offset: HostOffset, bytes: Vec<u8>) -> &mut Table {
        self.dirty.get().insert(offset);
        let table = Table {
            offset,
            dirty: Some(0..bytes.len()),
            bytes,
            all: self.dirty.clone(),
            fresh: true,
            used: true,
            queued: false,
            words: self.words,
        };
        self.tables.entry(offset).insert_entry(table).into_mut()
    }

    /// Forgets a table whose cluster has no owner any more, changes included.
    pub(crate) fn forget(&mut self, offset: HostOffset) {
        if self.tables.remove(&offset).is_some() {
            self.dirty.get().remove(&offset);
        }
        // Those that are gone are passed over by the clock, which may not turn for long.
        if self.queue.len() > 2 * self.tables.len() + 64 {
            let tables = &self.tables;
            self.queue.retain(|at| tables.get(at).is_some_and(|table| table.queued));
        }
    }

    /// Whether the table at `offset` is in memory.
    pub(crate) fn contains(&self, offset: HostOffset) -> bool {
        self.tables.contains_key(&offset)
    }

    /// As [`TableCache::forget`], for all tables in a part of the file.
    pub(crate) fn forget_range(&mut self, range: &Range<HostOffset>) {
        let step = self.table_len.max(1);
        if (range.end.0 - range.start.0) / to_u64(step) <= to_u64(self.tables.len()) {
            (range.start.0..range.end.0).step_by(step).for_each(|at| self.forget(HostOffset(at)));
        } else {
            let gone: Vec<_> =
                self.tables.keys().copied().filter(|at| range.contains(at)).collect();
            gone.into_iter().for_each(|at| self.forget(at));
        }
    }

    /// The table at `offset`, if it is in memory. It does not count as used.
    pub(crate) fn peek(&mut self, offset: HostOffset) -> Option<&mut Table> {
        self.tables.get_mut(&offset)
    }

    /// Whether any table differs from the disk.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.get().is_empty()
    }

    /// Whether the table at `offset` differs from the disk.
    pub(crate) fn is_table_dirty(&self, offset: HostOffset) -> bool {
        self.dirty.get().contains(&offset)
    }

    /// Moves a table that is in memory to a place that nothing on disk refers to; it is wholly dirty.
    pub(crate) fn rename(&mut self, from: HostOffset, to: HostOffset) {
        if let Some(table) = self.tables.get_mut(&from) {
            let bytes = std::mem::take(&mut table.bytes);
            self.forget(from);
            self.insert(to, bytes);
        }
    }

    /// The tables with changes to what is on disk in their places.
    pub(crate) fn dirty_in_place(&self) -> Vec<HostOffset> {
        let fresh = |at: &HostOffset| self.tables.get(at).is_some_and(|table| table.fresh);
        self.dirty.get().iter().copied().filter(|at| !fresh(at)).collect()
    }

    /// Writes all changes, in the order of the disk. What failed stays dirty.
    pub(crate) fn write_back(&mut self, storage: &dyn Storage) -> Result<()> {
        let dirty: Vec<HostOffset> = self.dirty.get().iter().copied().collect();
        self.write_some(storage, dirty)
    }

    /// As [`TableCache::write_back`], for tables to which nothing on disk refers.
    pub(crate) fn write_fresh(&mut self, storage: &dyn Storage) -> Result<()> {
        let fresh = |at: &HostOffset| self.tables.get(at).is_some_and(|table| table.fresh);
        let dirty: Vec<HostOffset> = self.dirty.get().iter().copied().filter(fresh).collect();
        self.write_some(storage, dirty)
    }

    fn write_some(&mut self, storage: &dyn Storage, dirty: Vec<HostOffset>) -> Result<()> {
        for offset in dirty {
            if let Some(table) = self.tables.get_mut(&offset)
                && let Some(range) = table.dirty.clone()
            {
                let at = offset + to_u64(range.start);
                storage.write_at(at.0, &[WriteBuf::new(&table.bytes[range])])?;
                table.dirty = None;
                table.fresh = false;
                if !std::mem::replace(&mut table.queued, true) {
                    self.queue.push_back(offset);
                }
            }
            self.dirty.get().remove(&offset);
        }
        Ok(())
    }

    /// Whether there are more tables than the limit.
    pub(crate) fn is_over(&self) -> bool {
        self.tables.len() > self.limit
    }

    /// Drops clean tables that were not used lately, down to the limit if there are enough.
    pub(crate) fn shrink(&mut self) {
        self.drop_clean(self.limit);
    }

    /// Drops clean tables that were not used since the last call (`cache-clean-interval`).
    pub(crate) fn drop_unused(&mut self) {
        for _ in 0..self.queue.len() {
            self.turn();
        }
    }

    fn drop_clean(&mut self, limit: usize) {
        // Each table is passed twice at most: used ones get a second chance.
        let mut left = self.queue.len() * 2;
        while self.tables.len() > limit && left > 0 && !self.queue.is_empty() {
            self.turn();
            left -= 1;
        }
    }

    /// Moves the clock's hand over one table.
    fn turn(&mut self) {
        let Some(offset) = self.queue.pop_front() else {
            return;
        };
        let Some(table) = self.tables.get_mut(&offset) else {
            return;
        };
        if table.dirty.is_some() {
            // It comes back when it has been written.
            table.queued = false;
        } else if std::mem::take(&mut table.used) {
            self.queue.push_back(offset);
        } else {
            self.tables.remove(&offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{MemoryStorage, Op};

    fn at(n: u64) -> HostOffset {
        HostOffset(n * 512)
    }

    fn cache() -> (TableCache, MemoryStorage) {
        let storage = MemoryStorage::new(vec![7; 512 * 100]);
        (TableCache::new(512, 512 * 10), storage)
    }

    #[test]
    fn the_cache_stays_at_its_limit_and_keeps_what_is_used() {
        let (mut cache, storage) = cache();
        for n in 0..100 {
            cache.load(&storage, at(n)).unwrap();
            cache.load(&storage, at(3)).unwrap();
            cache.shrink();
            assert!(!cache.is_over());
        }
        assert!(cache.contains(at(3)));
        assert!(cache.contains(at(99)) && !cache.contains(at(50)));
    }

    #[test]
    fn dirty_tables_stay_until_they_are_written_and_only_their_changes_are() {
        let (mut cache, storage) = cache();
        for n in 0..20 {
            cache.load(&storage, at(n)).unwrap().set_entry(5, n);
        }
        cache.shrink();
        assert!(cache.is_over() && cache.is_dirty());
        storage.record();
        storage.fail_after(Some(15), true);
        cache.write_back(&storage).unwrap_err();
        storage.fail_after(None, false);
        assert!(cache.is_dirty());
        cache.write_back(&storage).unwrap();
        let writes: Vec<Op> = (0..20).map(|n| Op::Write(n * 512 + 40, 8)).collect();
        let mut done = storage.recorded();
        done.dedup();
        assert_eq!(done, writes);
        assert!(!cache.is_dirty());
        cache.shrink();
        assert!(!cache.is_over());
    }

    #[test]
    fn a_forgotten_table_is_read_anew_and_its_changes_are_lost() {
        let (mut cache, storage) = cache();
        for round in 0..1000 {
            cache.load(&storage, at(1)).unwrap().set_entry(0, round);
            if round % 2 == 0 {
                cache.forget(at(1));
            } else {
                cache.forget_range(&(at(0)..at(round)));
            }
        }
        assert!(!cache.is_dirty());
        assert!(cache.queue.len() < 100, "the queue grows without end");
        assert_eq!(cache.load(&storage, at(1)).unwrap().entry(0), 0x0707_0707_0707_0707);
    }

    #[test]
    fn tables_that_were_not_used_are_dropped_at_the_second_look() {
        let (mut cache, storage) = cache();
        cache.load(&storage, at(1)).unwrap();
        cache.load(&storage, at(2)).unwrap().set_entry(0, 1);
        cache.drop_unused();
        assert!(cache.contains(at(1)));
        cache.drop_unused();
        assert!(!cache.contains(at(1)) && cache.contains(at(2)));
    }
}
