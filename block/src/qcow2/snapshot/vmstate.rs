//! Reading the VM state of a snapshot, straight from the snapshot's own tables.

use crate::iobuf;
use crate::qcow2::Qcow2;
use crate::qcow2::read::{Extent, Source};
use crate::snapshot::{SnapshotInfo, VmStateExtent, VmStatePlace, VmStateRead};
use crate::{Error, ReadBuf, Result};

use super::tables::Tables;

/// Bytes that are mapped at once.
const PIECE: u64 = 64 << 20;

/// The VM state of one snapshot.
pub(in crate::qcow2) struct VmState<'a> {
    tables: Tables<'a>,
    /// Guest offset at which VM state starts: the first L2 boundary past the snapshot's disk.
    base: u64,
    size: u64,
}

impl<'a> VmState<'a> {
    /// Opens the VM state of snapshot `id`.
    pub(crate) fn open(image: &'a Qcow2, id: &str) -> Result<Self> {
        Ok(Self::of(image, Tables::open(image, id)?))
    }

    /// Opens it without keeping the snapshot from being deleted: a read of one that has gone fails.
    pub(crate) fn look_at(image: &'a Qcow2, id: &str) -> Result<Self> {
        Ok(Self::of(image, Tables::look_at(image, id)?))
    }

    fn of(image: &Qcow2, (tables, info): (Tables<'a>, SnapshotInfo)) -> Self {
        let base = image.geometry.l1_entries(info.disk_size) * image.geometry.l2_coverage();
        Self { tables, base, size: info.vm_state_size }
    }

    fn place(&self, extent: &Extent) -> Option<VmStatePlace> {
        let Source::Host(host) = extent.source else { return None };
        Some(VmStatePlace { offset: extent.guest - self.base, len: extent.len, host: host.0 })
    }

    /// The L1 entry of a table, counted from the start of the VM state; 0 for one that is not there.
    pub(super) fn l1_entry(&self, table: u64) -> u64 {
        let first = self.base / self.tables.image.geometry.l2_coverage();
        self.tables.l1_entry(first.saturating_add(table))
    }

    fn map(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let mut extents = self.tables.map(self.base + offset, len)?;
        for extent in &mut extents {
            self.tables.image.check_stored(extent.source, extent.len)?;
            // The backing file has no VM state.
            if extent.source == Source::Backing {
                extent.source = Source::Zero;
            }
        }
        Ok(extents)
    }

    /// The recorded size may claim anything: what is past the table's end cannot be asked for.
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.tables.image.geometry;
        let end = self.tables.l1_len().saturating_mul(geometry.l2_coverage());
        let mapped = end.saturating_sub(self.base);
        let size = self.size.min(mapped).next_multiple_of(geometry.cluster_size());
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }
}

impl VmStateRead for VmState<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        self.check(offset, len)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE);
            let extents = self.map(offset + done, n)?;
            let part = iobuf::slice_read(bufs, done, n);
            self.tables.image.read_extents(&extents, &part, true)?;
            done += n;
        }
        // What was read of one that has gone may be somebody else's.
        self.tables.check_there()
    }

    fn places(&self, offset: u64, len: u64) -> Result<Vec<VmStatePlace>> {
        self.check(offset, len)?;
        let mut out: Vec<VmStatePlace> = Vec::new();
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE);
            for place in self.map(offset + done, n)?.iter().filter_map(|e| self.place(e)) {
                match out.last_mut() {
                    Some(last)
                        if last.offset + last.len == place.offset
                            && last.host + last.len == place.host =>
                    {
                        last.len += place.len;
                    }
                    _ => out.push(place),
                }
            }
            done += n;
        }
        Ok(out)
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<VmStateExtent>> {
        self.check(offset, len)?;
        let mut out: Vec<VmStateExtent> = Vec::new();
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE);
            for extent in self.map(offset + done, n)? {
                let zero = extent.source == Source::Zero;
                match out.last_mut() {
                    Some(last) if last.zero == zero => last.len += extent.len,
                    _ => out.push(VmStateExtent {
                        offset: extent.guest - self.base,
                        len: extent.len,
                        zero,
                    }),
                }
            }
            done += n;
        }
        Ok(out)
    }
}
