//! The refcounts as they are in the file.

use std::collections::HashMap;

use crate::num::to_usize;
use crate::qcow2::counts;
use crate::{ReadBuf, Result};

use super::image::{Image, MAX_OFFSET};

/// Memory for refcount blocks.
const CACHE_BYTES: u64 = 16 << 20;

/// Bits of a table entry that hold the block's offset.
pub(super) const BLOCK_MASK: u64 = !0x1ff;

/// The refcount at `index` of a block.
pub(super) fn get(block: &[u8], index: u64, order: u32) -> u64 {
    counts::get(block, to_usize(index), order)
}

/// Sets the refcount at `index` of a block; gives the bytes it is in.
pub(super) fn set(block: &mut [u8], index: u64, order: u32, value: u64) -> std::ops::Range<usize> {
    let index = to_usize(index);
    counts::set(block, index, order, value);
    counts::bytes_of(&(index..index + 1), order)
}

/// What the table has for a range of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// All its clusters are free.
    None,
    /// It is at this offset.
    At(u64),
    /// The entry refers to no place where a block can be.
    Broken,
}

/// The refcount table, and its blocks as they are asked for.
#[derive(Debug)]
pub(super) struct DiskRefcounts {
    /// The entries that lie within the file.
    pub(super) table: Vec<u64>,
    blocks: HashMap<u64, Vec<u8>>,
    most: usize,
}

impl DiskRefcounts {
    /// Reads the table.
    pub(super) fn open(image: &Image<'_>) -> Result<Self> {
        Ok(Self {
            table: image.read_table(image.reftable_offset, image.reftable_bytes() / 8)?,
            blocks: HashMap::new(),
            most: to_usize((CACHE_BYTES >> image.cluster_bits).max(4)),
        })
    }

    /// The block of a range of clusters.
    pub(super) fn block(&self, image: &Image<'_>, index: u64) -> Block {
        let entry = self.table.get(to_usize(index)).copied().unwrap_or(0);
        match entry & BLOCK_MASK {
            0 => Block::None,
            at if !image.aligned(at) || at > MAX_OFFSET - image.cluster_size() => Block::Broken,
            at => Block::At(at),
        }
    }

    /// The bytes of a block.
    pub(super) fn load(&mut self, image: &Image<'_>, at: u64) -> Result<&[u8]> {
        if self.blocks.len() >= self.most && !self.blocks.contains_key(&at) {
            self.blocks.clear();
        }
        match self.blocks.entry(at) {
            std::collections::hash_map::Entry::Occupied(block) => Ok(block.into_mut()),
            std::collections::hash_map::Entry::Vacant(place) => {
                let mut bytes = vec![0; to_usize(image.cluster_size())];
                if at < image.file_len {
                    image.storage.read_at(at, &[ReadBuf::new(&mut bytes)])?;
                }
                Ok(place.insert(bytes))
            }
        }
    }

    /// The refcount of a cluster; `None` if it cannot be told.
    pub(super) fn get(&mut self, image: &Image<'_>, cluster: u64) -> Option<u64> {
        let entries = image.block_entries();
        match self.block(image, cluster / entries) {
            Block::None => Some(0),
            Block::Broken => None,
            Block::At(at) => {
                let order = image.refcount_order;
                self.load(image, at).ok().map(|bytes| get(bytes, cluster % entries, order))
            }
        }
    }

    /// Forgets blocks that were read, because they were changed in the file.
    pub(super) fn forget(&mut self) {
        self.blocks.clear();
    }
}
