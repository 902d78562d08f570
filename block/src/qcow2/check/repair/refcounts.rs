//! Puts refcounts right: in place where the structure is whole, else by building it anew.

use crate::num::{to_u64, to_usize};
use crate::qcow2::header::{MAX_REFTABLE_BYTES, field};
use crate::{Error, Progress, Result, WriteBuf};

use super::super::counts::Counts;
use super::super::image::Image;
use super::super::refcounts::{Block, DiskRefcounts, get, set};

/// Which counts may be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// Those that are too high.
    TooHigh,
    All,
}

/// Whether each cluster with references has a block that can be written.
pub(super) fn blocks_suffice(image: &Image<'_>, counts: &Counts, disk: &DiskRefcounts) -> bool {
    let (entries, total) = (image.block_entries(), counts.len());
    let mut at = 0;
    while at < total {
        let index = at / entries;
        let end = ((index + 1) * entries).min(total);
        let usable = match disk.block(image, index) {
            Block::At(block) => block < image.file_len,
            Block::Broken => false,
            Block::None => (counts.next_used(at, end)..end).all(|c| counts.get(c) == 0),
        };
        if !usable {
            return false;
        }
        at = end;
    }
    true
}

/// Writes the counts that differ; each block is written once, and a count is only changed to what
/// the tables on disk hold, so a crash leaves some counts right and others as they were.
pub(super) fn correct(
    image: &Image<'_>,
    counts: &Counts,
    disk: &mut DiskRefcounts,
    which: Which,
    progress: &Progress,
) -> Result<()> {
    let (entries, order) = (image.block_entries(), image.refcount_order);
    let total = counts.len();
    let mut at = 0;
    while at < total {
        progress.check()?;
        let index = at / entries;
        let end = ((index + 1) * entries).min(total);
        if let Block::At(block) = disk.block(image, index)
            && block < image.file_len
        {
            let mut bytes = disk.load(image, block)?.to_vec();
            let mut changed: Option<std::ops::Range<usize>> = None;
            for cluster in at..end {
                let (stored, wanted) = (get(&bytes, cluster % entries, order), counts.get(cluster));
                if stored > wanted || (stored < wanted && which == Which::All) {
                    let range = set(&mut bytes, cluster % entries, order, wanted);
                    changed = Some(changed.map_or(range.start, |c| c.start)..range.end);
                }
            }
            if let Some(range) = changed {
                let place = block + to_u64(range.start);
                image.storage.write_at(place, &[WriteBuf::new(&bytes[range])])?;
            }
        }
        at = end;
    }
    disk.forget();
    Ok(())
}

/// Builds a new refcount table with its blocks behind the end of the file.
///
/// Order: blocks and table, flush, header, flush. Until the header is written nothing refers to
/// what is new. `counts` must not count the old structure, which is free afterwards.
pub(super) fn rebuild(image: &Image<'_>, counts: &mut Counts, progress: &Progress) -> Result<()> {
    let entries = image.block_entries();
    let first = image.clusters().max(counts.len());
    let used = used_blocks(image, counts);
    let (mut blocks, mut table) = (to_u64(used.len()), 1);
    let indices = loop {
        let end = first + table + blocks;
        let mut indices = used.clone();
        indices.extend(first / entries..=(end - 1) / entries);
        indices.sort_unstable();
        indices.dedup();
        let last = indices.last().copied().unwrap_or(0);
        let wanted = ((last + 1) * 8).div_ceil(image.cluster_size());
        if to_u64(indices.len()) <= blocks && wanted <= table {
            break indices;
        }
        blocks = blocks.max(to_u64(indices.len()));
        table = table.max(wanted);
    };
    if table << image.cluster_bits > MAX_REFTABLE_BYTES.max(image.cluster_size()) {
        return Err(Error::NotSupported(format!(
            "Image '{}' is too large for a refcount table with its clusters of {} bytes; \
             'qemu-img convert' makes a copy with larger ones",
            image.storage.name(),
            image.cluster_size()
        )));
    }
    counts.grow(first + table + blocks);
    for cluster in first..first + table + to_u64(indices.len()) {
        counts.add(cluster, 1);
    }
    let mut entries_out = vec![0; to_usize(table << image.cluster_bits)];
    for (n, index) in indices.iter().enumerate() {
        progress.check()?;
        let mut bytes = vec![0; to_usize(image.cluster_size())];
        let end = ((index + 1) * entries).min(counts.len());
        for cluster in counts.next_used(index * entries, end)..end {
            set(&mut bytes, cluster % entries, image.refcount_order, counts.get(cluster));
        }
        let place = (first + table + to_u64(n)) << image.cluster_bits;
        image.storage.write_at(place, &[WriteBuf::new(&bytes)])?;
        let at = to_usize(*index) * 8;
        entries_out[at..at + 8].copy_from_slice(&place.to_be_bytes());
    }
    let place = first << image.cluster_bits;
    image.storage.write_at(place, &[WriteBuf::new(&entries_out)])?;
    image.storage.flush()?;
    // Both fields in one write within one sector: the old table or the new one, never a mix.
    let mut fields = [0; 12];
    fields[..8].copy_from_slice(&place.to_be_bytes());
    fields[8..].copy_from_slice(&u32::try_from(table).unwrap_or(u32::MAX).to_be_bytes());
    image.storage.write_at(field::REFCOUNT_TABLE, &[WriteBuf::new(&fields)])?;
    image.storage.flush()
}

/// The blocks that have a count.
fn used_blocks(image: &Image<'_>, counts: &Counts) -> Vec<u64> {
    let entries = image.block_entries();
    let mut used = Vec::new();
    let mut at = 0;
    loop {
        at = counts.next_used(at, counts.len());
        if at >= counts.len() {
            return used;
        }
        // Blocks of few entries share a chunk of counters with others that may be empty.
        let index = at / entries;
        let end = ((index + 1) * entries).min(counts.len());
        if (at..end).any(|cluster| counts.get(cluster) != 0) {
            used.push(index);
        }
        at = end;
    }
}
