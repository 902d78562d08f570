//! Reading the VM state of a snapshot, straight from the snapshot's own tables.

use crate::iobuf;
use crate::num::to_usize;
use crate::qcow2::Qcow2;
use crate::qcow2::read::{Extent, Source, map};
use crate::snapshot::{VmStateExtent, VmStateRead};
use crate::{Error, ReadBuf, Result};

use super::{find, load_l1};

/// Bytes that are mapped at once.
const PIECE: u64 = 64 << 20;

/// The VM state of one snapshot. While it is open the snapshot cannot be deleted.
pub(in crate::qcow2) struct VmState<'a> {
    image: &'a Qcow2,
    id: String,
    l1: Vec<u64>,
    /// Guest offset at which VM state starts: the first L2 boundary past the snapshot's disk.
    base: u64,
    size: u64,
}

impl<'a> VmState<'a> {
    /// Opens the VM state of snapshot `id`.
    pub(crate) fn open(image: &'a Qcow2, id: &str) -> Result<Self> {
        let mut meta = image.meta();
        let entry = find(&meta, id)?;
        let l1 = load_l1(&meta, &entry)?;
        let geometry = meta.geometry();
        let base = geometry.l1_entries(entry.info.disk_size) * geometry.l2_coverage();
        meta.readers.push(id.to_owned());
        Ok(Self { image, id: id.to_owned(), l1, base, size: entry.info.vm_state_size })
    }

    /// The L1 entry of a table, counted from the start of the VM state; 0 for one that is not there.
    pub(super) fn l1_entry(&self, table: u64) -> u64 {
        let first = self.base / self.image.geometry.l2_coverage();
        self.l1.get(to_usize(first.saturating_add(table))).copied().unwrap_or(0)
    }

    fn map(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let mut meta = self.image.meta();
        meta.trim_clean();
        let entry = |_: &_, index| self.l1.get(to_usize(index)).copied().unwrap_or(0);
        let mut extents = map(&mut meta, entry, self.base + offset, len)?;
        drop(meta);
        for extent in &mut extents {
            self.image.check_stored(extent.source, extent.len)?;
            // The backing file has no VM state.
            if extent.source == Source::Backing {
                extent.source = Source::Zero;
            }
        }
        Ok(extents)
    }

    /// The recorded size may claim anything: what is past the table's end cannot be asked for.
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.image.geometry;
        let end = u64::try_from(self.l1.len()).unwrap_or(0).saturating_mul(geometry.l2_coverage());
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
            self.image.read_extents(&extents, &part, true)?;
            done += n;
        }
        Ok(())
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

impl Drop for VmState<'_> {
    fn drop(&mut self) {
        let mut meta = self.image.meta();
        if let Some(at) = meta.readers.iter().position(|id| *id == self.id) {
            meta.readers.swap_remove(at);
        }
    }
}
