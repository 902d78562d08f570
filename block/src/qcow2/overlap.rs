//! Where the image's own tables are, so that no write ever lands on one by mistake.
//!
//! A damaged image may have an L2 entry that points to a table, or a refcount of 0 for one. Before
//! anything is written to a cluster, or a free cluster is taken, [`Places`] is asked. It costs a few
//! look-ups: single clusters (L2 tables, refcount blocks) are bits of sparse bitmaps, tables of
//! several clusters are sorted ranges.

use std::collections::HashMap;

use super::layout::{HostCluster, Run};

bitflags::bitflags! {
    /// Kinds of metadata that writes are checked against (QMP: `Qcow2OverlapCheckFlags`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct OverlapCheck: u16 {
        /// The header's cluster.
        const MAIN_HEADER = 1;
        /// The L1 table of the active disk.
        const ACTIVE_L1 = 1 << 1;
        /// Its L2 tables.
        const ACTIVE_L2 = 1 << 2;
        /// The refcount table.
        const REFCOUNT_TABLE = 1 << 3;
        /// The refcount blocks.
        const REFCOUNT_BLOCK = 1 << 4;
        /// The snapshot table.
        const SNAPSHOT_TABLE = 1 << 5;
        /// The L1 tables of snapshots.
        const INACTIVE_L1 = 1 << 6;
        /// Their L2 tables: read at opening, which takes a while.
        const INACTIVE_L2 = 1 << 7;
        /// The directory of persistent bitmaps.
        const BITMAP_DIRECTORY = 1 << 8;

        /// What is at a place that the header names.
        const CONSTANT = Self::MAIN_HEADER.bits() | Self::ACTIVE_L1.bits()
            | Self::REFCOUNT_TABLE.bits() | Self::SNAPSHOT_TABLE.bits()
            | Self::BITMAP_DIRECTORY.bits();
        /// What is in memory anyway.
        const CACHED = Self::CONSTANT.bits() | Self::ACTIVE_L2.bits()
            | Self::REFCOUNT_BLOCK.bits() | Self::INACTIVE_L1.bits();
        /// Everything.
        const ALL = Self::CACHED.bits() | Self::INACTIVE_L2.bits();
    }
}

impl Default for OverlapCheck {
    /// As in QEMU.
    fn default() -> Self {
        Self::CACHED
    }
}

impl OverlapCheck {
    /// QMP's member names.
    pub const MEMBERS: [(&'static str, Self); 9] = [
        ("main-header", Self::MAIN_HEADER),
        ("active-l1", Self::ACTIVE_L1),
        ("active-l2", Self::ACTIVE_L2),
        ("refcount-table", Self::REFCOUNT_TABLE),
        ("refcount-block", Self::REFCOUNT_BLOCK),
        ("snapshot-table", Self::SNAPSHOT_TABLE),
        ("inactive-l1", Self::INACTIVE_L1),
        ("inactive-l2", Self::INACTIVE_L2),
        ("bitmap-directory", Self::BITMAP_DIRECTORY),
    ];

    /// QMP's `Qcow2OverlapCheckMode`: "none", "constant", "cached" or "all".
    pub fn template(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::empty(),
            "constant" => Self::CONSTANT,
            "cached" => Self::CACHED,
            "all" => Self::ALL,
            _ => return None,
        })
    }

    /// What QEMU calls a kind in its messages.
    pub(crate) fn title(self) -> &'static str {
        const TITLES: [(OverlapCheck, &str); 9] = [
            (OverlapCheck::MAIN_HEADER, "qcow2_header"),
            (OverlapCheck::ACTIVE_L1, "active L1 table"),
            (OverlapCheck::ACTIVE_L2, "active L2 table"),
            (OverlapCheck::REFCOUNT_TABLE, "refcount table"),
            (OverlapCheck::REFCOUNT_BLOCK, "refcount block"),
            (OverlapCheck::SNAPSHOT_TABLE, "snapshot table"),
            (OverlapCheck::INACTIVE_L1, "inactive L1 table"),
            (OverlapCheck::INACTIVE_L2, "inactive L2 table"),
            (OverlapCheck::BITMAP_DIRECTORY, "bitmap directory"),
        ];
        TITLES.iter().find(|(kind, _)| *kind == self).map_or("metadata", |(_, title)| title)
    }
}

impl OverlapCheck {
    /// QEMU's message for a write that would have hit this kind.
    pub(crate) fn prevented(self) -> String {
        format!("Preventing invalid write on metadata (overlaps with {})", self.title())
    }
}

const CHUNK_BITS: u32 = 12;

/// A set of host clusters: a bitmap in chunks of 4096 clusters, of which only those in use are there.
#[derive(Debug, Default)]
pub(super) struct ClusterSet {
    chunks: HashMap<u64, Box<[u64; 64]>>,
}

impl ClusterSet {
    fn place(cluster: HostCluster) -> (u64, usize, u64) {
        let in_chunk = cluster.0 & ((1 << CHUNK_BITS) - 1);
        let word = usize::try_from(in_chunk >> 6).unwrap_or(0);
        (cluster.0 >> CHUNK_BITS, word, 1 << (in_chunk & 63))
    }

    /// Adds a cluster; says whether it was new.
    pub(crate) fn insert(&mut self, cluster: HostCluster) -> bool {
        let (chunk, word, bit) = Self::place(cluster);
        let word = &mut self.chunks.entry(chunk).or_insert_with(|| Box::new([0; 64]))[word];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Takes a cluster out.
    pub(crate) fn remove(&mut self, cluster: HostCluster) {
        let (chunk, word, bit) = Self::place(cluster);
        if let Some(words) = self.chunks.get_mut(&chunk) {
            words[word] &= !bit;
            if words.iter().all(|w| *w == 0) {
                self.chunks.remove(&chunk);
            }
        }
    }

    /// Takes the clusters of a run out.
    pub(crate) fn remove_run(&mut self, run: Run) {
        if self.chunks.is_empty() {
            return;
        }
        let mut at = run.first;
        while at < run.end() {
            let chunk = at.0 >> CHUNK_BITS;
            let end = run.end().min(HostCluster((chunk + 1) << CHUNK_BITS));
            if self.chunks.contains_key(&chunk) {
                (at.0..end.0).for_each(|cluster| self.remove(HostCluster(cluster)));
            }
            at = end;
        }
    }

    /// Whether a cluster is in it.
    pub(crate) fn contains(&self, cluster: HostCluster) -> bool {
        let (chunk, word, bit) = Self::place(cluster);
        self.chunks.get(&chunk).is_some_and(|words| words[word] & bit != 0)
    }

    /// The first of a run's clusters that is in it.
    pub(crate) fn first_in(&self, run: Run) -> Option<HostCluster> {
        run.clusters().find(|cluster| self.contains(*cluster))
    }
}

/// Ranges of clusters, which may overlap in a damaged image.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// Sorted, apart from each other.
    ranges: Vec<(HostCluster, HostCluster)>,
}

impl Ranges {
    pub(crate) fn new(mut runs: Vec<Run>) -> Self {
        runs.retain(|run| run.count > 0);
        runs.sort_unstable_by_key(|run| run.first);
        let mut ranges: Vec<(HostCluster, HostCluster)> = Vec::new();
        for run in runs {
            match ranges.last_mut() {
                Some((_, end)) if *end >= run.first => *end = (*end).max(run.end()),
                _ => ranges.push((run.first, run.end())),
            }
        }
        Self { ranges }
    }

    /// Whether a run has a cluster of one of them.
    pub(crate) fn overlap(&self, run: Run) -> bool {
        let next = self.ranges.partition_point(|(_, end)| *end <= run.first);
        self.ranges.get(next).is_some_and(|(start, _)| *start < run.end())
    }
}

/// What is known of the places of metadata beyond what the header says.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The kinds that are looked at.
    pub(crate) check: OverlapCheck,
    /// L2 tables of the active disk, those that it shares with snapshots included.
    pub(crate) l2: ClusterSet,
    /// L2 tables of snapshots, if they are looked at.
    pub(crate) inactive_l2: ClusterSet,
    /// L1 tables of snapshots.
    pub(crate) inactive_l1: Ranges,
    pub(crate) bitmap_directory: Option<Run>,
}

impl Places {
    /// The first of the kinds in `wanted` that has one of a run's clusters. `top` are the tables that
    /// the header knows; refcount blocks are known to whoever counts.
    pub(crate) fn find(
        &self,
        top: &[(OverlapCheck, Option<Run>)],
        run: Run,
        wanted: OverlapCheck,
    ) -> Option<OverlapCheck> {
        let hit = |table: &Run| run.first < table.end() && table.first < run.end();
        let top = top.iter().map(|(kind, table)| (*kind, table.as_ref().is_some_and(hit)));
        top.chain([
            (OverlapCheck::ACTIVE_L2, self.l2.first_in(run).is_some()),
            (OverlapCheck::INACTIVE_L1, self.inactive_l1.overlap(run)),
            (OverlapCheck::INACTIVE_L2, self.inactive_l2.first_in(run).is_some()),
        ])
        .find(|(kind, hit)| *hit && wanted.contains(*kind))
        .map(|(kind, _)| kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> Run {
        Run { first: HostCluster(first), count }
    }

    #[test]
    fn a_set_holds_what_was_put_in_and_no_neighbour() {
        let mut set = ClusterSet::default();
        for n in [0, 63, 64, 4095, 4096, 1 << 47] {
            assert!(set.insert(HostCluster(n)));
            assert!(!set.insert(HostCluster(n)));
        }
        assert!(set.contains(HostCluster(4096)) && !set.contains(HostCluster(4097)));
        assert_eq!(set.first_in(run(1, 100)), Some(HostCluster(63)));
        set.remove(HostCluster(63));
        assert_eq!(set.first_in(run(1, 100)), Some(HostCluster(64)));
        set.remove(HostCluster(1 << 47));
        assert_eq!(set.chunks.len(), 2, "an empty chunk takes no memory");
        set.remove_run(run(1, 5000));
        assert!(set.contains(HostCluster(0)) && set.first_in(run(1, 9000)).is_none());
    }

    #[test]
    fn ranges_find_an_overlap_however_they_lie() {
        let ranges = Ranges::new(vec![run(10, 5), run(3, 1), run(12, 10), run(40, 0)]);
        for (first, count, hit) in [
            (0, 3, false),
            (0, 4, true),
            (4, 6, false),
            (4, 7, true),
            (21, 9, true),
            (22, 100, false),
        ] {
            assert_eq!(ranges.overlap(run(first, count)), hit, "{first} {count}");
        }
    }

    #[test]
    fn templates_have_the_members_that_qemu_gives_them() {
        assert_eq!(OverlapCheck::template("none"), Some(OverlapCheck::empty()));
        let all = OverlapCheck::MEMBERS.iter().fold(OverlapCheck::empty(), |set, (_, k)| set | *k);
        assert_eq!(OverlapCheck::template("all"), Some(all));
        assert_eq!(OverlapCheck::default(), all - OverlapCheck::INACTIVE_L2);
        assert_eq!(OverlapCheck::template("zz"), None);
    }
}
