//! What an L2 entry says of its cluster and, with extended L2 entries, of each of 32 subclusters
//! ("Extended L2 Entries" of the specification).
//!
//! A cluster of an image without extended entries is treated as one that has one subcluster: reads
//! and writes know one way only.

use std::ops::Range;

use super::layout::{COPIED, Geometry, HostOffset, Mapping, ZERO};

/// An L2 entry, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cluster {
    /// The cluster as a whole: what owns host clusters. With extended entries never `Zero`.
    pub(crate) mapping: Mapping,
    /// Subclusters whose data is in the host cluster, a bit each.
    pub(crate) allocated: u32,
    /// Subclusters that read as zeroes.
    pub(crate) zero: u32,
}

/// Bits `range` of a bitmap.
pub(super) fn mask(range: Range<u32>) -> u32 {
    let below = |n: u32| if n >= 32 { u32::MAX } else { (1 << n) - 1 };
    below(range.end) & !below(range.start)
}

impl Cluster {
    /// Decodes an entry and its bitmap, which is 0 without extended entries; the error says which
    /// rule is broken.
    pub(crate) fn decode(
        entry: u64,
        bitmap: u64,
        guest: u64,
        geometry: Geometry,
    ) -> Result<Self, &'static str> {
        let mapping = Mapping::decode(entry, geometry)?;
        if geometry.external
            && let Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } = mapping
            && host.0 != geometry.cluster_start(guest)
        {
            return Err(
                "external data file host cluster offset does not match guest cluster offset",
            );
        }
        let (allocated, zero) = match mapping {
            _ if geometry.extended => {
                let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
                (low(bitmap), low(bitmap >> 32))
            }
            Mapping::Unallocated | Mapping::Compressed { .. } => (0, 0),
            Mapping::Zero { .. } => (0, 1),
            Mapping::Data { .. } => (1, 0),
        };
        match mapping {
            // The specification wants no bits at all there; what QEMU ignores is ignored here.
            Mapping::Compressed { .. } => return Ok(Self { mapping, allocated: 0, zero: 0 }),
            Mapping::Unallocated if allocated != 0 => {
                return Err("subclusters are allocated in a cluster that is not");
            }
            _ if allocated & zero != 0 => {
                return Err("a subcluster is both allocated and zero");
            }
            _ => {}
        }
        Ok(Self { mapping, allocated, zero })
    }

    /// The words of the entry for a cluster at `host`, ours alone, with these subclusters.
    pub(crate) fn encode(
        host: Option<HostOffset>,
        allocated: u32,
        zero: u32,
        geometry: Geometry,
    ) -> (u64, u64) {
        let place = host.map_or(0, |host| host.0 | COPIED);
        if geometry.extended {
            return (place, u64::from(zero) << 32 | u64::from(allocated));
        }
        (if zero != 0 { place | ZERO } else { place }, 0)
    }

    /// How a subcluster is mapped.
    pub(crate) fn at(self, index: u32) -> Mapping {
        let bit = 1u32 << index;
        match self.mapping {
            Mapping::Compressed { .. } => self.mapping,
            Mapping::Data { .. } if self.allocated & bit != 0 => self.mapping,
            Mapping::Data { host, copied } if self.zero & bit != 0 => {
                Mapping::Zero { host: Some(host), copied }
            }
            _ if self.zero & bit != 0 => match self.mapping {
                zero @ Mapping::Zero { .. } => zero,
                _ => Mapping::Zero { host: None, copied: false },
            },
            _ => Mapping::Unallocated,
        }
    }

    /// The host cluster, if writes may go there because nothing else refers to it.
    pub(crate) fn own_place(self) -> Option<HostOffset> {
        match self.mapping {
            Mapping::Data { host, copied: true }
            | Mapping::Zero { host: Some(host), copied: true } => Some(host),
            _ => None,
        }
    }

    /// The same of a cluster that is not the disk's alone.
    pub(crate) fn shared(mut self) -> Self {
        if let Mapping::Data { copied, .. } | Mapping::Zero { copied, .. } = &mut self.mapping {
            *copied = false;
        }
        self
    }

    /// The subclusters whose data must move when the cluster gets another place: all between the
    /// first and the last.
    pub(crate) fn stored(self, geometry: Geometry) -> Option<Range<u32>> {
        match self.mapping {
            Mapping::Compressed { .. } => Some(0..geometry.subclusters()),
            _ if self.allocated == 0 => None,
            _ => Some(self.allocated.trailing_zeros()..32 - self.allocated.leading_zeros()),
        }
    }

    /// Whether a set of subclusters reads as zeroes; `bare` says that there is no backing file.
    pub(crate) fn reads_zero(self, set: u32, bare: bool) -> bool {
        match self.mapping {
            Mapping::Compressed { .. } => false,
            _ => set & !self.zero & if bare { self.allocated } else { u32::MAX } == 0,
        }
    }
}

impl Geometry {
    /// The subclusters that a range within the cluster of `guest` touches.
    pub(crate) fn touched(self, guest: u64, len: u64) -> Range<u32> {
        let at = self.in_cluster(guest);
        let size = self.subcluster_size();
        let index = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).min(self.subclusters());
        index(at / size)..index((at + len).div_ceil(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENDED: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        version: 3,
        extended: true,
        external: false,
    };

    #[test]
    fn bitmaps_that_break_a_rule_are_refused() {
        let host = 0x5_0000 | COPIED;
        for (entry, bitmap, good) in [
            (host, 1 << 32 | 1, false),
            (host, 1 << 33 | 1, true),
            (0, 1, false),
            (0, 1 << 32, true),
            (host, u64::MAX, false),
            (0x5_0200, 0, false),
        ] {
            let decoded = Cluster::decode(entry, bitmap, 0, EXTENDED);
            assert_eq!(decoded.is_ok(), good, "{entry:#x} {bitmap:#x}");
        }
    }

    #[test]
    fn each_subcluster_is_mapped_by_its_bits() {
        let host = HostOffset(0x5_0000);
        let (entry, bitmap) = Cluster::encode(Some(host), 0b101, 0b1000, EXTENDED);
        let cluster = Cluster::decode(entry, bitmap, 0, EXTENDED).unwrap();
        assert_eq!(cluster.at(0), Mapping::Data { host, copied: true });
        assert_eq!(cluster.at(1), Mapping::Unallocated);
        assert_eq!(cluster.at(3), Mapping::Zero { host: Some(host), copied: true });
        assert_eq!(cluster.stored(EXTENDED), Some(0..3));
        assert!(cluster.reads_zero(0b1000, false) && !cluster.reads_zero(0b1010, false));
        assert!(cluster.reads_zero(0b1010, true) && !cluster.reads_zero(0b1100, true));
        assert_eq!(mask(0..32), u32::MAX);
        assert_eq!(mask(3..5), 0b11000);
        assert_eq!(EXTENDED.touched(2048 * 3 + 1, 2048), 3..5);
        assert_eq!(EXTENDED.touched(0, 65536), 0..32);
    }

    #[test]
    fn a_cluster_without_subclusters_has_one() {
        let plain = Geometry { extended: false, ..EXTENDED };
        let host = HostOffset(0x5_0000);
        let cluster = Cluster::decode(host.0 | COPIED | ZERO, 0, 0, plain).unwrap();
        assert_eq!(cluster.at(0), Mapping::Zero { host: Some(host), copied: true });
        assert_eq!(cluster.own_place(), Some(host));
        assert_eq!(Cluster::encode(Some(host), 0, 1, plain), (host.0 | COPIED | ZERO, 0));
        assert_eq!(Cluster::encode(None, 0, 0, plain), (0, 0));
        assert_eq!(plain.touched(5, 100), 0..1);
    }
}
