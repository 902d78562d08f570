//! Whether the disk is still as in a snapshot.
//!
//! After a snapshot or a revert every L2 table below the active L1 table is shared with the snapshot.
//! A shared table is never written: whatever changes the disk makes a copy of it, or a first one,
//! and so changes an entry of the active L1 table. Equal L1 tables say that nothing was written.

use crate::Result;
use crate::num::to_u64;
use crate::qcow2::Qcow2;

use super::tree::plain_entries;
use super::{find, load_l1};

/// Whether nothing was written to the disk since it was that of snapshot `id`. May say no of a disk
/// that has the same contents.
pub(in crate::qcow2) fn is_current(image: &Qcow2, id: &str) -> Result<bool> {
    let meta = image.meta();
    let entry = find(&meta, id)?;
    if meta.changing || meta.header.size != entry.info.disk_size {
        return Ok(false);
    }
    let l1 = load_l1(&meta, &entry)?;
    let count = meta.geometry().l1_entries(entry.info.disk_size);
    // The active table has nothing behind the disk's entries.
    let here = plain_entries(&meta.l1, to_u64(meta.l1.len()).max(count));
    let mut there = plain_entries(&l1, count);
    there.resize(here.len(), 0);
    Ok(here == there)
}
