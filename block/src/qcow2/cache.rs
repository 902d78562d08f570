//! Tables of one cluster each (L2 tables, refcount blocks) kept in memory, written back later.

use std::collections::HashMap;
use std::ops::Range;

use crate::num::{be64, to_u64, to_usize};
use crate::storage::Storage;
use crate::{ReadBuf, Result, WriteBuf};

use super::layout::HostOffset;

/// A table as it shall be on disk.
#[derive(Debug)]
pub(super) struct Table {
    bytes: Vec<u8>,
    /// Bytes that differ from the disk.
    dirty: Option<Range<usize>>,
    used: u64,
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
            None => range.clone(),
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
    table_len: usize,
    limit: usize,
    clock: u64,
    words: usize,
}

impl TableCache {
    /// A cache of about `bytes` bytes for tables of `table_len` bytes.
    pub(crate) fn new(table_len: u64, bytes: u64) -> Self {
        Self {
            tables: HashMap::new(),
            table_len: to_usize(table_len),
            limit: to_usize((bytes / table_len).max(8)),
            clock: 0,
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
        self.clock += 1;
        let table = match self.tables.entry(offset) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let mut bytes = vec![0; self.table_len];
                storage.read_at(offset.0, &[ReadBuf::new(&mut bytes)])?;
                entry.insert(Table { bytes, dirty: None, used: 0, words: self.words })
            }
        };
        table.used = self.clock;
        Ok(table)
    }

    /// Puts a new table at `offset`, wholly dirty.
    pub(crate) fn insert(&mut self, offset: HostOffset, bytes: Vec<u8>) -> &mut Table {
        self.clock += 1;
        let words = self.words;
        let table = Table { dirty: Some(0..bytes.len()), bytes, used: self.clock, words };
        self.tables.entry(offset).insert_entry(table).into_mut()
    }

    /// Forgets a table whose cluster has no owner any more, changes included.
    pub(crate) fn forget(&mut self, offset: HostOffset) {
        self.tables.remove(&offset);
    }

    /// Whether any table differs from the disk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.tables.values().any(|t| t.dirty.is_some())
    }

    /// Writes all changes, in the order of the disk. What failed stays dirty.
    pub(crate) fn write_back(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut dirty: Vec<_> =
            self.tables.iter_mut().filter(|(_, table)| table.dirty.is_some()).collect();
        dirty.sort_unstable_by_key(|(offset, _)| **offset);
        for (offset, table) in dirty {
            if let Some(range) = table.dirty.clone() {
                let at = *offset + to_u64(range.start);
                storage.write_at(at.0, &[WriteBuf::new(&table.bytes[range])])?;
                table.dirty = None;
            }
        }
        Ok(())
    }

    /// Whether there are more tables than the limit.
    pub(crate) fn is_over(&self) -> bool {
        self.tables.len() > self.limit
    }

    /// Drops the least recently used clean tables, down to half of the limit.
    pub(crate) fn shrink(&mut self) {
        let mut ages: Vec<_> = self
            .tables
            .iter()
            .filter(|(_, table)| table.dirty.is_none())
            .map(|(offset, table)| (table.used, *offset))
            .collect();
        ages.sort_unstable();
        let excess = self.tables.len().saturating_sub(self.limit / 2);
        for (_, offset) in ages.into_iter().take(excess) {
            self.tables.remove(&offset);
        }
    }
}
