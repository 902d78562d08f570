//! Reading the disk of a snapshot, straight from the snapshot's own tables.

use crate::iobuf;
use crate::qcow2::Qcow2;
use crate::snapshot::DiskRead;
use crate::{Error, ReadBuf, Result, StatusExtent};

use super::tables::Tables;

/// The disk as it was at a snapshot, over the backing file as it is.
pub(in crate::qcow2) struct SnapshotDisk<'a> {
    tables: Tables<'a>,
    size: u64,
}

impl<'a> SnapshotDisk<'a> {
    /// Opens the disk of snapshot `id`.
    pub(crate) fn open(image: &'a Qcow2, id: &str) -> Result<Self> {
        let (tables, info) = Tables::open(image, id)?;
        Ok(Self { tables, size: info.disk_size })
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size: self.size }),
        }
    }
}

impl DiskRead for SnapshotDisk<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        self.check(offset, len)?;
        let image = self.tables.image;
        let mut done = 0;
        while done < len {
            let n = image.piece(offset + done, len - done);
            let extents = self.tables.map(offset + done, n)?;
            image.read_extents(&extents, &iobuf::slice_read(bufs, done, n), false)?;
            done += n;
        }
        Ok(())
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.check(offset, len)?;
        self.tables.image.status_by(offset, len, |at, n| self.tables.map(at, n))
    }
}
