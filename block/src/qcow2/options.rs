//! How an image is to be opened: QMP's `BlockdevOptionsQcow2`.

use std::sync::Arc;
use std::time::Duration;

use crate::storage::Storage;
use crate::{Error, Result};

use super::layout::Geometry;
use super::overlap::OverlapCheck;

/// What the opener says beyond what the image says. `None` is the default of each.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Refuse writes.
    pub read_only: bool,
    /// Which metadata writes are checked against.
    pub overlap_check: OverlapCheck,
    /// Where the data clusters are, if the image has an external data file.
    pub data_file: Option<Arc<dyn Storage>>,
    /// Defer refcount updates under the dirty bit; `None`: as the image says.
    pub lazy_refcounts: Option<bool>,
    /// Bytes of both caches together.
    pub cache: Option<u64>,
    /// Bytes of L2 tables kept in memory.
    pub l2_cache: Option<u64>,
    /// Bytes that the L2 cache reads at once: here always a cluster.
    pub l2_cache_entry: Option<u64>,
    /// Bytes of refcount blocks kept in memory.
    pub refcount_cache: Option<u64>,
    /// Tables that are not used for this long are dropped from memory; zero or `None`: never. Looked
    /// at when the image is used.
    pub cache_clean_interval: Option<Duration>,
    /// Which freed clusters' space is given back to the host.
    pub pass_discard: PassDiscard,
    /// Discarded clusters keep their place in the image.
    pub discard_no_unref: bool,
    /// Shows the disk as it was at the snapshot of this id; read-only.
    pub snapshot: Option<String>,
    /// The date that this snapshot must have, as [`crate::SnapshotInfo::date_text`] tells it: ids are used again.
    pub snapshot_date: Option<String>,
}

/// QMP's `pass-discard-*`. Unlike in QEMU all are on by default: freed space goes back to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassDiscard {
    /// What the guest discarded.
    pub request: bool,
    /// What a deleted or replaced snapshot had.
    pub snapshot: bool,
    /// Everything else, such as copied tables.
    pub other: bool,
}

impl Default for PassDiscard {
    fn default() -> Self {
        Self { request: true, snapshot: true, other: true }
    }
}

/// Bytes of the caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheSizes {
    pub(crate) l2: u64,
    pub(crate) refcount: u64,
}

/// As QEMU on Linux: enough for 256 GiB with clusters of 64 KiB.
const L2_CACHE: u64 = 32 << 20;
/// Enough for 256 GiB too: the sum is below what a disk of any size may take.
const REFCOUNT_CACHE: u64 = 8 << 20;
/// Fewest refcount blocks, as in QEMU.
const MIN_REFCOUNT_BLOCKS: u64 = 4;

impl Options {
    /// The sizes of the caches by QEMU's rules.
    ///
    /// # Errors
    /// With QEMU's texts, if they contradict one another.
    pub(super) fn cache_sizes(&self, size: u64, geometry: Geometry) -> Result<CacheSizes> {
        let fail = |text: &str| Err(Error::Invalid(text.to_owned()));
        let cluster = geometry.cluster_size();
        if let Some(entry) = self.l2_cache_entry {
            if !entry.is_power_of_two() || !(512..=cluster).contains(&entry) {
                return Err(Error::Invalid(format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
                )));
            }
            if entry != cluster {
                return Err(Error::NotSupported(format!(
                    "Parameter 'l2-cache-entry-size' with value {entry} is not supported, only the cluster size ({cluster})"
                )));
            }
        }
        let Some(both) = self.cache else {
            return Ok(CacheSizes {
                l2: self.l2_cache.unwrap_or(L2_CACHE),
                refcount: self.refcount_cache.unwrap_or(REFCOUNT_CACHE),
            });
        };
        match (self.l2_cache, self.refcount_cache) {
            (Some(_), Some(_)) => fail(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
            (Some(l2), None) if l2 > both => fail("l2-cache-size may not exceed cache-size"),
            (None, Some(n)) if n > both => fail("refcount-cache-size may not exceed cache-size"),
            (Some(l2), None) => Ok(CacheSizes { l2, refcount: both - l2 }),
            (None, Some(n)) => Ok(CacheSizes { l2: both - n, refcount: n }),
            (None, None) => {
                // The L2 tables come first: every request needs them.
                let whole = geometry.l1_entries(size).saturating_mul(cluster);
                let blocks = MIN_REFCOUNT_BLOCKS * cluster;
                let l2 = both.saturating_sub(blocks).min(whole);
                Ok(CacheSizes { l2, refcount: both - l2 })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_sizes_follow_qemus_rules() {
        let geometry = Geometry {
            cluster_bits: 16,
            refcount_order: 4,
            version: 3,
            extended: false,
            external: false,
        };
        let sizes = |cache, l2_cache, refcount_cache| {
            let options = Options { cache, l2_cache, refcount_cache, ..Options::default() };
            let sizes = options.cache_sizes(1 << 40, geometry).map_err(|e| e.to_string())?;
            Ok::<_, String>((sizes.l2, sizes.refcount))
        };
        const MIB: u64 = 1 << 20;
        assert_eq!(sizes(None, None, None), Ok((32 * MIB, 8 * MIB)));
        assert_eq!(sizes(Some(16 * MIB), Some(10 * MIB), None), Ok((10 * MIB, 6 * MIB)));
        assert_eq!(sizes(Some(16 * MIB), None, Some(MIB)), Ok((15 * MIB, MIB)));
        assert_eq!(sizes(Some(MIB), None, None), Ok((MIB - 262_144, 262_144)));
        assert_eq!(sizes(Some(1 << 40), None, None), Ok((128 * MIB, (1 << 40) - 128 * MIB)));
        for (cache, l2, refcount, text) in [
            (MIB, Some(2 * MIB), None, "l2-cache-size may not exceed cache-size"),
            (MIB, None, Some(2 * MIB), "refcount-cache-size may not exceed cache-size"),
            (MIB, Some(1), Some(1), "may not be set at the same time"),
        ] {
            let error = sizes(Some(cache), l2, refcount).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        let entry = |n| Options { l2_cache_entry: Some(n), ..Options::default() };
        assert!(entry(65536).cache_sizes(0, geometry).is_ok());
        for n in [256, 1000, 4096, 131_072] {
            assert!(entry(n).cache_sizes(0, geometry).is_err(), "{n}");
        }
    }
}
