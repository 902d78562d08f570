//! How many references each cluster of the file has, in little memory.
//!
//! There is a counter for a cluster of the file, never for one that a header only claims. Parts of
//! the file without references cost nothing; a counter has one byte until it needs more. A 1 TiB
//! image with 64 KiB clusters, all in use, takes 16 MiB.

use std::collections::BTreeSet;

use crate::num::{to_u64, to_usize};

/// Clusters whose counters are kept together.
pub(super) const CHUNK: u64 = 4096;

#[derive(Debug, Clone)]
enum Chunk {
    Empty,
    Byte(Box<[u8]>),
    Short(Box<[u16]>),
    Long(Box<[u64]>),
}

/// References to each cluster of a file.
#[derive(Debug)]
pub(super) struct Counts {
    chunks: Vec<Chunk>,
    len: u64,
    max: u64,
    /// Clusters that have more references than `max`.
    over: BTreeSet<u64>,
}

impl Counts {
    /// Counters for `len` clusters that go up to `max`.
    pub(super) fn new(len: u64, max: u64) -> Self {
        let chunks = vec![Chunk::Empty; to_usize(len.div_ceil(CHUNK))];
        Self { chunks, len, max, over: BTreeSet::new() }
    }

    /// How many clusters there are counters for.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Makes room for the cluster `len - 1`.
    pub(super) fn grow(&mut self, len: u64) {
        if len > self.len {
            self.len = len;
            self.chunks.resize(to_usize(len.div_ceil(CHUNK)), Chunk::Empty);
        }
    }

    /// References to a cluster; 0 past the end.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let at = to_usize(cluster % CHUNK);
        match self.chunks.get(to_usize(cluster / CHUNK)) {
            None | Some(Chunk::Empty) => 0,
            Some(Chunk::Byte(counts)) => counts[at].into(),
            Some(Chunk::Short(counts)) => counts[at].into(),
            Some(Chunk::Long(counts)) => counts[at],
        }
    }

    /// Adds references to a cluster that is in range; gives how many did not fit.
    pub(super) fn add(&mut self, cluster: u64, references: u64) -> u64 {
        let old = self.get(cluster);
        let new = old.saturating_add(references).min(self.max);
        if new != old {
            self.set(cluster, new);
        }
        let excess = references - (new - old);
        if excess > 0 {
            self.over.insert(cluster);
        }
        excess
    }

    /// Whether a cluster has more than `own` references, also where a counter cannot tell.
    pub(super) fn exceeds(&self, cluster: u64, own: u64) -> bool {
        self.get(cluster) > own || self.over.contains(&cluster)
    }

    fn set(&mut self, cluster: u64, count: u64) {
        let at = to_usize(cluster % CHUNK);
        let Some(chunk) = self.chunks.get_mut(to_usize(cluster / CHUNK)) else {
            return;
        };
        loop {
            match chunk {
                Chunk::Byte(counts) => {
                    if let Ok(count) = u8::try_from(count) {
                        counts[at] = count;
                        return;
                    }
                    *chunk = Chunk::Short(counts.iter().map(|c| u16::from(*c)).collect());
                }
                Chunk::Short(counts) => {
                    if let Ok(count) = u16::try_from(count) {
                        counts[at] = count;
                        return;
                    }
                    *chunk = Chunk::Long(counts.iter().map(|c| u64::from(*c)).collect());
                }
                Chunk::Long(counts) => {
                    counts[at] = count;
                    return;
                }
                Chunk::Empty => *chunk = Chunk::Byte(vec![0; to_usize(CHUNK)].into()),
            }
        }
    }

    /// The first cluster from `from` on that may have references, `end` if there is none before.
    pub(super) fn next_used(&self, from: u64, end: u64) -> u64 {
        let first = to_usize(from / CHUNK);
        for (n, chunk) in self.chunks.iter().enumerate().skip(first) {
            if to_u64(n) * CHUNK >= end {
                break;
            }
            if !matches!(chunk, Chunk::Empty) {
                return from.max(to_u64(n) * CHUNK);
            }
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_grow_as_needed_and_stop_at_their_most() {
        let mut counts = Counts::new(10_000, u64::from(u16::MAX));
        assert_eq!(counts.add(9999, 1), 0);
        assert_eq!(counts.add(9999, 255), 0);
        assert_eq!(counts.get(9999), 256);
        assert_eq!(counts.get(9998), 0);
        assert_eq!(counts.add(9999, 70_000), 70_000 - (65_535 - 256));
        let mut counts = Counts::new(10, u64::MAX);
        assert_eq!(counts.add(3, u64::MAX - 1), 0);
        assert_eq!(counts.add(3, 2), 1);
        assert_eq!(counts.add(4, 7), 0);
        assert_eq!((counts.get(3), counts.get(4)), (u64::MAX, 7));
        let mut counts = Counts::new(10, 1);
        assert_eq!(counts.add(3, 1), 0);
        assert!(!counts.exceeds(3, 1) && counts.exceeds(3, 0));
        assert_eq!(counts.add(3, 1), 1);
        assert!(counts.exceeds(3, 1) && !counts.exceeds(4, 1) && counts.get(3) == 1);
    }

    #[test]
    fn parts_without_references_are_skipped() {
        let mut counts = Counts::new(100 * CHUNK, 255);
        assert_eq!(counts.next_used(5, counts.len()), 100 * CHUNK);
        counts.add(50 * CHUNK + 7, 1);
        assert_eq!(counts.next_used(5, counts.len()), 50 * CHUNK);
        assert_eq!(counts.next_used(50 * CHUNK + 9, counts.len()), 50 * CHUNK + 9);
        assert_eq!(counts.next_used(5, 50 * CHUNK), 50 * CHUNK);
        counts.grow(100 * CHUNK + 1);
        counts.add(100 * CHUNK, 1);
        assert_eq!(counts.next_used(51 * CHUNK, counts.len()), 100 * CHUNK);
    }
}
