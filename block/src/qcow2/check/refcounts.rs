//! The refcounts as they are in the file.

use std::collections::HashMap;

use crate::num::to_usize;
use crate::{ReadBuf, Result};

use super::image::{Image, MAX_OFFSET};

/// Memory for refcount blocks.
const CACHE_BYTES: u64 = 16 << 20;

/// Bits of a table entry that hold the block's offset.
pub(super) const BLOCK_MASK: u64 = !0x1ff;

/// The refcount at `index` of a block ("Refcount blocks": widths below a byte start at the least
/// significant bit).
pub(super) fn get(block: &[u8], index: u64, order: u32) -> u64 {
    let width = 1usize << order;
    let index = to_usize(index);
    if order < 3 {
        let bit = index * width;
        return u64::from(block[bit / 8] >> (bit % 8)) & ((1 << width) - 1);
    }
    let len = width / 8;
    block[index * len..][..len].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the refcount at `index` of a block; gives the bytes it is in.
pub(super) fn set(block: &mut [u8], index: u64, order: u32, value: u64) -> std::ops::Range<usize> {
    let width = 1usize << order;
    let index = to_usize(index);
    if order < 3 {
        let (at, shift) = (index * width / 8, index * width % 8);
        let mask = ((1u8 << width) - 1) << shift;
        let [low, ..] = value.to_le_bytes();
        block[at] = (block[at] & !mask) | (low << shift & mask);
        return at..at + 1;
    }
    let range = index * width / 8..(index + 1) * width / 8;
    block[range.clone()].copy_from_slice(&value.to_be_bytes()[8 - width / 8..]);
    range
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
