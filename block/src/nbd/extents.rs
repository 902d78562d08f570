//! Block status as the descriptors of a context.

use crate::status::StatusExtent;
use crate::{Format, Result};

use super::export::Context;
use super::wire::reply::Descriptor;

/// "base:allocation": nothing is stored.
const STATE_HOLE: u64 = 1;
/// "base:allocation": reads as zeroes.
const STATE_ZERO: u64 = 2;
/// "qemu:dirty-bitmap:...": written to.
const STATE_DIRTY: u64 = 1;

/// Descriptors of one reply; a client asks again for what is left.
const MOST: usize = 4096;

/// The status of a prefix of the range in one context; with `one`, of one extent.
pub(super) fn describe(
    format: &dyn Format,
    context: &Context<'_>,
    offset: u64,
    len: u64,
    one: bool,
) -> Result<Vec<Descriptor>> {
    let most = if one { 1 } else { MOST };
    let mut list = match context {
        Context::Allocation => merge(&format.block_status(offset, len)?, allocation),
        Context::Depth => {
            merge(&format.block_status(offset, len)?, |extent| u64::from(extent.depth))
        }
        Context::Bitmap(bitmap) => bitmap
            .extents(offset, len, most)
            .into_iter()
            .map(|extent| Descriptor {
                len: extent.len,
                status: if extent.dirty { STATE_DIRTY } else { 0 },
            })
            .collect(),
    };
    if list.is_empty() {
        // The disk was shortened meanwhile; a reply has at least one descriptor.
        list.push(Descriptor { len, status: 0 });
    }
    list.truncate(most);
    Ok(list)
}

fn allocation(extent: &StatusExtent) -> u64 {
    let hole = if extent.data { 0 } else { STATE_HOLE };
    hole | if extent.zero { STATE_ZERO } else { 0 }
}

/// Descriptors of extents, equal neighbours made one.
fn merge(extents: &[StatusExtent], status: impl Fn(&StatusExtent) -> u64) -> Vec<Descriptor> {
    let mut list: Vec<Descriptor> = Vec::new();
    for extent in extents {
        let status = status(extent);
        match list.last_mut() {
            Some(last) if last.status == status => last.len += extent.len,
            _ => list.push(Descriptor { len: extent.len, status }),
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_that_differ_only_in_what_the_context_does_not_tell_are_one() {
        let extents = [
            StatusExtent::data(5),
            StatusExtent { depth: 2, ..StatusExtent::data(6) },
            StatusExtent { depth: 2, ..StatusExtent::zero(7) },
            StatusExtent::unallocated(8),
        ];
        let list = |pairs: &[(u64, u64)]| -> Vec<_> {
            pairs.iter().map(|&(len, status)| Descriptor { len, status }).collect()
        };
        assert_eq!(merge(&extents, allocation), list(&[(11, 0), (15, 3)]));
        let depths = merge(&extents, |extent| u64::from(extent.depth));
        assert_eq!(depths, list(&[(5, 1), (13, 2), (8, 0)]));
    }
}
