//! Internal snapshots: a copy of the L1 table, with a reference taken to everything below it.
//!
//! Writes that come after the snapshot point ([`point`]) go to new clusters, whether the snapshot is
//! published or rolled back afterwards.

mod area;
mod create;
mod current;
mod delete;
mod disk;
mod point;
mod revert;
mod sizes;
mod table;
mod tables;
mod tree;
mod view;
mod vmstate;

pub(super) use create::Create;
pub(super) use current::is_current;
pub(super) use delete::Delete;
pub(super) use disk::SnapshotDisk;
pub(super) use point::Point;
pub(super) use revert::{Revert, write_disk_place};
pub(super) use sizes::sizes;
pub(super) use table::{Entry, read_table};
pub(super) use tree::{runs_of, set_copied};
pub(super) use view::view;
pub(super) use vmstate::VmState;

use crate::{Error, Result};

use super::Qcow2;
use super::header::MAX_L1_BYTES;
use super::layout::{HostOffset, Run, table_of};
use super::meta::{Meta, check_l1, read_l1};

/// How far a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begun,
    Prepared,
    /// Visible in memory.
    Shown,
    Published,
    Ended,
}

impl Stage {
    /// Refuses a step that is out of order.
    fn expect(self, wanted: Self) -> Result<()> {
        if self == wanted {
            Ok(())
        } else {
            Err(Error::Invalid(format!("snapshot change is {self:?}, this step needs {wanted:?}")))
        }
    }
}

/// Starts a change of what `load` finds, if it does: one at a time for an image.
fn begin_change<T>(image: &Qcow2, load: impl FnOnce(&Meta) -> Result<T>) -> Result<T> {
    image.mark_bitmaps_left()?;
    let mut meta = image.meta();
    if image.geometry.external {
        // The other file has no counts: what a snapshot keeps could not be told from the rest.
        return Err(Error::NotSupported(format!(
            "Image '{}' has an external data file: internal snapshots are not supported with it",
            meta.storage.name()
        )));
    }
    meta.check_writable()?;
    if meta.changing {
        return Err(Error::Invalid(format!(
            "Image '{}': another change of its snapshots is under way",
            meta.storage.name()
        )));
    }
    let loaded = load(&meta)?;
    meta.changing = true;
    Ok(loaded)
}

/// Finds a snapshot by its id.
fn find(meta: &Meta, id: &str) -> Result<Entry> {
    meta.snapshots.iter().find(|entry| entry.info.id == id).cloned().ok_or_else(|| {
        Error::NoSuchSnapshot { tag: id.to_owned(), node: meta.storage.name().to_owned() }
    })
}

/// Reads a snapshot's L1 table, whose place and size an image may claim at will.
fn load_l1(meta: &Meta, entry: &Entry) -> Result<Vec<u64>> {
    let geometry = meta.geometry();
    let bytes = u64::from(entry.l1_size) * 8;
    let end = entry.l1_offset.checked_add(bytes);
    let len = meta.storage.len()?;
    let wrong = if bytes > MAX_L1_BYTES {
        Some("is too large")
    } else if geometry.in_cluster(entry.l1_offset) != 0 {
        Some("is not cluster aligned")
    } else if end.is_none_or(|end| end > len) {
        Some("is beyond the end of the file")
    } else if u64::from(entry.l1_size) < geometry.l1_entries(entry.info.disk_size) {
        Some("is too small for its disk")
    } else {
        None
    };
    if let Some(wrong) = wrong {
        return Err(meta.damaged(format!(
            "the L1 table of snapshot '{}' ({} entries at {:#x}) {wrong}",
            entry.info.id, entry.l1_size, entry.l1_offset
        )));
    }
    let l1 = read_l1(&*meta.storage, entry.l1_offset, entry.l1_size)?;
    let what = format!("the L1 table of snapshot '{}'", entry.info.id);
    check_l1(&*meta.storage, geometry, &what, &l1)?;
    Ok(l1)
}

/// Notes the places of all L2 tables of snapshots (`overlap-check.inactive-l2`). A snapshot whose L1
/// table breaks a rule is left out: it is refused when it is used.
pub(super) fn note_inactive_l2(meta: &mut Meta) -> Result<()> {
    /// Many more than a sound image has; an image may name one large table very often.
    const MOST: u64 = 1 << 26;
    let sizes = meta.snapshots.iter().map(|entry| u64::from(entry.l1_size));
    if sizes.fold(0, u64::saturating_add) > MOST {
        return Err(Error::NotSupported(format!(
            "Image '{}': its snapshots have too many tables for overlap-check.inactive-l2",
            meta.storage.name()
        )));
    }
    let geometry = meta.geometry();
    for entry in meta.snapshots.clone() {
        match load_l1(meta, &entry) {
            Ok(l1) => {
                for table in l1.into_iter().filter_map(table_of) {
                    meta.places.inactive_l2.insert(geometry.cluster_of(table));
                }
            }
            Err(Error::Corrupt { reason, .. }) => tracing::warn!("{reason}"),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The clusters of a snapshot's L1 table.
fn l1_run(meta: &Meta, entry: &Entry) -> Run {
    let geometry = meta.geometry();
    Run {
        first: geometry.cluster_of(HostOffset(entry.l1_offset)),
        count: geometry.clusters(u64::from(entry.l1_size) * 8),
    }
}

/// After a walk over all tables of `l1`: makes what changed durable ahead of the sync that requests wait for, if it
/// may be much.
fn flush_ahead_of(image: &Qcow2, l1: &[u64]) -> Result<()> {
    const MUCH: u64 = 1 << 20;
    let tables = crate::num::to_u64(l1.iter().filter(|entry| **entry != 0).count());
    if image.geometry.bytes_of(tables) > MUCH { image.flush_ahead() } else { Ok(()) }
}

/// Writes an L1 table, which has an entry at least, to fresh clusters.
pub(super) fn write_l1(meta: &mut Meta, l1: &[u64]) -> Result<Run> {
    write_fresh(meta, crate::num::be_bytes(l1))
}

/// Writes bytes, padded to whole clusters, to fresh clusters in a row.
pub(super) fn write_fresh(meta: &mut Meta, mut bytes: Vec<u8>) -> Result<Run> {
    use crate::num::{to_u64, to_usize};
    let geometry = meta.geometry();
    let count = geometry.clusters(to_u64(bytes.len()));
    bytes.resize(to_usize(geometry.bytes_of(count)), 0);
    let run = meta.allocate(count, true)?;
    let at = geometry.offset_of(run.first).0;
    if let Err(e) = meta.storage.write_at(at, &[crate::WriteBuf::new(&bytes)]) {
        meta.free_after_error(&[run]);
        return Err(e);
    }
    Ok(run)
}

#[cfg(test)]
mod tests;
