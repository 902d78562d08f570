//! Sizes and entry formats of a qcow2 image ("Cluster mapping" of the qcow2 specification).

use std::fmt::{self, Formatter, LowerHex};
use std::ops::Add;

/// Entry bits that hold a cluster-aligned host offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Refcount is exactly one: the cluster may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3).
pub(super) const ZERO: u64 = 1;
/// Parts of a cluster with extended L2 entries.
const SUBCLUSTERS: u32 = 32;
/// Host offsets have 56 bits in table entries.
pub(super) const MAX_HOST: u64 = 1 << 56;

/// An offset in the image file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct HostOffset(pub(crate) u64);

/// The index of a cluster of the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HostCluster(pub(crate) u64);

impl Add<u64> for HostOffset {
    type Output = Self;
    fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl Add<u64> for HostCluster {
    type Output = Self;
    fn add(self, clusters: u64) -> Self {
        Self(self.0 + clusters)
    }
}

impl LowerHex for HostOffset {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        LowerHex::fmt(&self.0, f)
    }
}

impl LowerHex for HostCluster {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        LowerHex::fmt(&self.0, f)
    }
}

/// The L2 table that an L1 entry refers to.
pub(super) fn table_of(l1_entry: u64) -> Option<HostOffset> {
    match l1_entry & OFFSET_MASK {
        0 => None,
        offset => Some(HostOffset(offset)),
    }
}

/// What all sizes in an image follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// log2 of the cluster size in bytes.
    pub(crate) cluster_bits: u32,
    /// log2 of the width of a refcount in bits.
    pub(crate) refcount_order: u32,
    /// Format version, 2 or 3.
    pub(crate) version: u32,
    /// L2 entries have a second word: a bitmap of 32 subclusters.
    pub(crate) extended: bool,
    /// Data clusters are in a file of their own, at the guest's offsets and without refcounts.
    pub(crate) external: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    pub(crate) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the entries of an L2 table.
    pub(crate) fn l2_bits(self) -> u32 {
        self.cluster_bits - 3 - u32::from(self.extended)
    }

    /// Words of 64 bits of an L2 entry.
    pub(crate) fn entry_words(self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    /// Parts of a cluster that are mapped on their own.
    pub(crate) fn subclusters(self) -> u32 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }

    /// Bytes of such a part.
    pub(crate) fn subcluster_size(self) -> u64 {
        self.cluster_size() / u64::from(self.subclusters())
    }

    /// The offset within its subcluster.
    pub(crate) fn in_subcluster(self, offset: u64) -> u64 {
        offset & (self.subcluster_size() - 1)
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Bytes of guest disk that one L2 table maps.
    pub(crate) fn l2_coverage(self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Entries of a refcount block.
    pub(crate) fn block_entries(self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Largest refcount.
    pub(crate) fn max_refcount(self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        }
    }

    /// Clusters that hold `bytes`.
    pub(crate) fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The start of the cluster that `offset` is in.
    pub(crate) fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The offset within its cluster.
    pub(crate) fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Index in the L1 table of a guest offset.
    pub(crate) fn l1_index(self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    /// Index in its L2 table of a guest offset.
    pub(crate) fn l2_index(self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// The host cluster at a host offset.
    pub(crate) fn cluster_of(self, host: HostOffset) -> HostCluster {
        HostCluster(host.0 >> self.cluster_bits)
    }

    /// The host offset of a host cluster.
    pub(crate) fn offset_of(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// The bytes of `count` clusters.
    pub(crate) fn bytes_of(self, count: u64) -> u64 {
        count << self.cluster_bits
    }
}

/// Consecutive host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(crate) first: HostCluster,
    /// How many.
    pub(crate) count: u64,
}

impl Run {
    /// One cluster.
    pub(crate) fn one(cluster: HostCluster) -> Self {
        Self { first: cluster, count: 1 }
    }

    /// The cluster after the last.
    pub(crate) fn end(self) -> HostCluster {
        self.first + self.count
    }

    /// All of them, in order.
    pub(crate) fn clusters(self) -> impl Iterator<Item = HostCluster> {
        (self.first.0..self.end().0).map(HostCluster)
    }
}

/// Adds a run to a list, joining it with the last one where they touch.
pub(super) fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

/// The L2 entry of a compressed cluster of `len` bytes at `host`, fewer than a cluster; `None` if the
/// entry has too few bits for the offset.
pub(super) fn compressed_entry(host: HostOffset, len: u64, geometry: Geometry) -> Option<u64> {
    let offset_bits = 62 - (geometry.cluster_bits - 8);
    let sectors = (host.0 + len - 1) / 512 - host.0 / 512;
    (host.0 + len < 1 << offset_bits).then_some(COMPRESSED | sectors << offset_bits | host.0)
}

/// What an L2 entry says about its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Not stored here: the backing file's contents, or zeroes without one.
    Unallocated,
    /// Reads as zeroes; may still own a host cluster.
    Zero {
        /// Host offset of the cluster kept for later writes.
        host: Option<HostOffset>,
        /// Whether nothing else refers to that cluster.
        copied: bool,
    },
    /// Stored as it is.
    Data {
        /// Where.
        host: HostOffset,
        /// Whether nothing else refers to the cluster.
        copied: bool,
    },
    /// Stored compressed, anywhere in host clusters that others may share.
    Compressed {
        /// Where its first byte is.
        host: HostOffset,
        /// Bytes to read; the stream may end before.
        len: u64,
    },
}

impl Mapping {
    /// Decodes an L2 entry; the error says which rule it breaks.
    pub(crate) fn decode(entry: u64, geometry: Geometry) -> Result<Self, &'static str> {
        if entry & COMPRESSED != 0 {
            if geometry.external {
                return Err("Compressed cluster entry found in image with external data file");
            }
            let offset_bits = 62 - (geometry.cluster_bits - 8);
            let host = entry & ((1 << offset_bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
            if host >= MAX_HOST {
                return Err("compressed cluster beyond the largest host offset");
            }
            return Ok(Self::Compressed {
                host: HostOffset(host),
                len: sectors * 512 - host % 512,
            });
        }
        let host = entry & OFFSET_MASK;
        // A data file of its own has the guest's data only: nothing is ever shared there.
        let copied = entry & COPIED != 0 || (geometry.external && host != 0);
        if geometry.in_cluster(host) != 0 {
            return Err("data cluster offset is not cluster aligned");
        }
        if entry & ZERO != 0 && !geometry.extended {
            if geometry.version < 3 {
                return Err("zero cluster in a version 2 image");
            }
            return Ok(Self::Zero { host: (host != 0).then_some(HostOffset(host)), copied });
        }
        Ok(match host {
            // In a data file of its own, offset 0 is the guest's first cluster.
            0 if geometry.external && copied => Self::Data { host: HostOffset(0), copied },
            0 => Self::Unallocated,
            host => Self::Data { host: HostOffset(host), copied },
        })
    }

    /// The host clusters that the entry holds a reference to.
    pub(crate) fn run(self, geometry: Geometry) -> Option<Run> {
        match self {
            _ if geometry.external => None,
            Self::Unallocated | Self::Zero { host: None, .. } => None,
            Self::Zero { host: Some(host), .. } | Self::Data { host, .. } => {
                Some(Run::one(geometry.cluster_of(host)))
            }
            Self::Compressed { host, len } => {
                let first = geometry.cluster_of(host);
                let last = geometry.cluster_of(host + (len - 1));
                Some(Run { first, count: last.0 - first.0 + 1 })
            }
        }
    }
}
