//! A bitmap's table and data clusters.

use std::ops::Range;

use crate::bitmap::Bits;
use crate::num::{be_bytes, be64, to_u64, to_usize};
use crate::qcow2::layout::{Geometry, HostOffset, Run};
use crate::qcow2::meta::Meta;
use crate::storage::Storage;
use crate::{ReadBuf, Result, WriteBuf};

use super::directory::{Check, Entry, check_place};

/// Table entry: all bits of the cluster are set, and there is no cluster.
const ALL_ONES: u64 = 1;
/// Data is written in pieces of this many bytes, or of one cluster.
const PIECE: u64 = 1 << 20;

/// What a table entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Zeroes,
    Ones,
    Data(HostOffset),
}

/// Decodes and checks a table.
pub(super) fn decode(bytes: &[u8], geometry: Geometry, file_len: u64) -> Check<Vec<Part>> {
    let part = |entry: u64| match entry {
        0 => Ok(Part::Zeroes),
        ALL_ONES => Ok(Part::Ones),
        entry => check_place("data cluster", entry, 1, geometry, file_len)
            .map(|()| Part::Data(HostOffset(entry))),
    };
    (0..bytes.len() / 8).map(|index| part(be64(bytes, index))).collect()
}

/// Reads the table of an entry whose place was checked.
pub(super) fn read(storage: &dyn Storage, entry: &Entry) -> Result<Vec<u8>> {
    let mut bytes = vec![0; to_usize(entry.table_bytes())];
    storage.read_at(entry.table_offset, &[ReadBuf::new(&mut bytes)])?;
    Ok(bytes)
}

/// The clusters of a bitmap: its table's and its data's.
pub(super) fn runs(entry: &Entry, parts: &[Part], geometry: Geometry) -> Vec<Run> {
    let first = geometry.cluster_of(HostOffset(entry.table_offset));
    let mut runs = vec![Run { first, count: geometry.clusters(entry.table_bytes()) }];
    for part in parts {
        if let Part::Data(host) = part {
            crate::qcow2::layout::push_run(&mut runs, Run::one(geometry.cluster_of(*host)));
        }
    }
    runs
}

/// The bits that a table entry stands for.
pub(super) fn bits_of(index: u64, geometry: Geometry) -> Range<u64> {
    let per_entry = geometry.cluster_size() * 8;
    index * per_entry..(index + 1) * per_entry
}

/// Writes a bitmap of `entries` table entries to fresh clusters. Gives the table's host offset, and
/// adds what was taken to `taken`, also after an error. Nothing is durable or counted on disk yet.
pub(super) fn write(
    meta: &mut Meta,
    bits: &Bits,
    entries: u64,
    taken: &mut Vec<Run>,
) -> Result<HostOffset> {
    let geometry = meta.geometry();
    let mut table = vec![0; to_usize(entries)];
    let mut data = Vec::new();
    let mut next = bits.next_set(0);
    while let Some(bit) = next {
        let index = bit / (geometry.cluster_size() * 8);
        let range = bits_of(index, geometry);
        if bits.all_set(range.clone()) {
            table[to_usize(index)] = ALL_ONES;
        } else {
            data.push(index);
        }
        next = bits.next_set(range.end);
    }
    let most = geometry.clusters(PIECE).max(1);
    let mut left = data.as_slice();
    while !left.is_empty() {
        let run = meta.allocate(to_u64(left.len()).min(most), false)?;
        taken.push(run);
        let (now, later) = left.split_at(to_usize(run.count));
        let mut bytes = vec![0; to_usize(geometry.bytes_of(run.count))];
        for ((n, index), cluster) in
            now.iter().enumerate().zip(bytes.chunks_exact_mut(to_usize(geometry.cluster_size())))
        {
            bits.copy_out(bits_of(*index, geometry).start, cluster);
            table[to_usize(*index)] = geometry.offset_of(run.first + to_u64(n)).0;
        }
        meta.storage.write_at(geometry.offset_of(run.first).0, &[WriteBuf::new(&bytes)])?;
        left = later;
    }
    let run = super::write_fresh(meta, be_bytes(&table))?;
    taken.push(run);
    Ok(geometry.offset_of(run.first))
}
