//! The rules for single table entries.

use super::image::Image;

/// Bits of an L1 entry, of an L2 entry of a standard cluster, and of a refcount table entry that
/// must be 0.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
pub(super) const BLOCK_RESERVED: u64 = 0x1ff;
/// Bits that hold a host offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Entry flags.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The half of a subcluster bitmap that tells what is allocated; the other tells what is zero.
const ALL_ALLOCATED: u64 = 0xffff_ffff;

/// What an L2 entry refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refers {
    /// No cluster.
    Nothing,
    /// A whole cluster, also one kept for a guest cluster that reads as zeroes.
    Cluster(u64),
    /// Bytes of a compressed cluster.
    Compressed(u64, u64),
    /// A compressed cluster where there must be none.
    Impossible,
}

/// Reads an L2 entry and its subcluster bitmap (0 without extended L2); `wrong` is called for each
/// rule that is broken.
pub(super) fn l2(
    image: &Image<'_>,
    entry: u64,
    bitmap: u64,
    mut wrong: impl FnMut(&'static str),
) -> Refers {
    if entry & COMPRESSED != 0 {
        if entry & COPIED != 0 {
            wrong("copied flag must never be set for compressed clusters");
        }
        if image.data_file() {
            wrong("compressed cluster with data file");
            return Refers::Impossible;
        }
        if bitmap != 0 {
            wrong("compressed cluster with non-zero subcluster allocation bitmap");
            return Refers::Impossible;
        }
        let (host, len) = image.compressed(entry & !COPIED);
        return Refers::Compressed(host, len);
    }
    if entry & L2_RESERVED != 0 {
        wrong("reserved bits are set");
    }
    let offset = entry & OFFSET;
    let zero = entry & ZERO != 0 && !image.extended();
    // Offset 0 of a data file is a place like others; there the flag tells that it is in use.
    let stored = offset != 0 || (image.data_file() && entry & COPIED != 0 && !zero);
    if !stored {
        if bitmap & ALL_ALLOCATED != 0 && !zero {
            wrong("unallocated cluster has non-zero subcluster allocation map");
        }
        return Refers::Nothing;
    }
    if (bitmap >> 32) & bitmap != 0 {
        wrong("allocated cluster with corrupted subcluster allocation bitmap");
    }
    if !image.aligned(offset) {
        wrong("data cluster is not properly aligned");
    }
    Refers::Cluster(offset)
}

/// An L2 entry as it should be, if it breaks a rule or refers to a place that cannot be: what can be
/// told from the rest of the entry is kept, else the guest reads zeroes.
pub(super) fn mended_l2(image: &Image<'_>, entry: u64, bitmap: u64) -> Option<(u64, u64)> {
    let mut bad = false;
    let refers = l2(image, entry, bitmap, |_| bad = true);
    let zeroes = match (image.extended(), image.version) {
        (true, _) => (0, ALL_ALLOCATED << 32),
        (false, 3..) => (ZERO, 0),
        (false, _) => (0, 0),
    };
    match refers {
        Refers::Impossible => Some(zeroes),
        Refers::Compressed(host, len) => {
            // Nothing but the header is in the first cluster.
            if host < image.cluster_size() || image.is_outside(host, len) {
                Some(zeroes)
            } else {
                bad.then_some((entry & !COPIED, bitmap))
            }
        }
        Refers::Cluster(host) => {
            let outside = !image.data_file() && image.is_outside(host, image.cluster_size());
            if !image.aligned(host) || outside {
                Some(zeroes)
            } else {
                // A subcluster cannot be both: what is stored wins over zeroes.
                let bitmap = bitmap & !((bitmap & ALL_ALLOCATED) << 32);
                bad.then_some((entry & !L2_RESERVED, bitmap))
            }
        }
        Refers::Nothing => bad.then_some((entry & !L2_RESERVED, bitmap & !ALL_ALLOCATED)),
    }
}

/// The place whose refcount decides about an L2 entry's COPIED flag; `None` if the flag is free.
pub(super) fn flagged(image: &Image<'_>, entry: u64) -> Option<u64> {
    let offset = entry & OFFSET;
    let zero = entry & ZERO != 0 && !image.extended();
    let stored = offset != 0 || (image.data_file() && entry & COPIED != 0 && !zero);
    (entry & COMPRESSED == 0 && stored).then_some(offset)
}
