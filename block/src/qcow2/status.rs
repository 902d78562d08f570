//! Block status: what is data and what is zeroes, without reading data.

use crate::status::StatusExtent;
use crate::{Format, Result};

use super::Qcow2;
use super::read::{Extent, Source};

/// Extents after which a call ends, so that neither memory nor time grow with the range.
const MAX_EXTENTS: usize = 2048;
/// L2 tables that a call looks into at most; each may have to be read from the disk.
const MAX_TABLES: u64 = 32;

impl Qcow2 {
    /// The status of a prefix of the range, of at least one byte unless the range is empty.
    pub(super) fn disk_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.check_range(offset, len)?;
        self.status_by(offset, len, |at, n| self.map_active(at, n))
    }

    /// As [`Qcow2::disk_status`] of what `map` maps.
    pub(super) fn status_by(
        &self,
        offset: u64,
        len: u64,
        map: impl Fn(u64, u64) -> Result<Vec<Extent>>,
    ) -> Result<Vec<StatusExtent>> {
        let coverage = self.geometry.l2_coverage();
        let end = offset + len;
        let mut list = Vec::new();
        let mut at = offset;
        for _ in 0..MAX_TABLES {
            if at >= end || list.len() >= MAX_EXTENTS {
                break;
            }
            let stop = end.min((at / coverage + 1).saturating_mul(coverage));
            for extent in map(at, stop - at)? {
                if list.len() >= MAX_EXTENTS || !self.push_status(extent, &mut list)? {
                    return Ok(list);
                }
            }
            at = stop;
        }
        Ok(list)
    }

    /// Says whether the whole extent is told of.
    fn push_status(&self, extent: Extent, list: &mut Vec<StatusExtent>) -> Result<bool> {
        let len = extent.len;
        match (extent.source, self.backing()) {
            (Source::Host(_) | Source::Compressed(..), _) => StatusExtent::data(len).push_to(list),
            (Source::Zero, _) => StatusExtent::zero(len).push_to(list),
            (Source::Backing, None) => StatusExtent::unallocated(len).push_to(list),
            (Source::Backing, Some(below)) => return push_below(&*below, extent, list),
        }
        Ok(true)
    }
}

/// Tells of a part that the backing image determines. Past its end it reads as zeroes, as if it
/// had them.
fn push_below(below: &dyn Format, extent: Extent, list: &mut Vec<StatusExtent>) -> Result<bool> {
    let inside = below.size().saturating_sub(extent.guest).min(extent.len);
    let mut told = 0;
    if inside > 0 {
        for part in below.block_status(extent.guest, inside)? {
            let depth = if part.depth == 0 { 0 } else { part.depth + 1 };
            StatusExtent { depth, ..part }.push_to(list);
            told += part.len;
        }
    }
    if told < inside {
        return Ok(false);
    }
    StatusExtent { depth: 2, ..StatusExtent::zero(extent.len - inside) }.push_to(list);
    Ok(true)
}
