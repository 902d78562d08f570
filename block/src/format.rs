//! What an image format must be able to do.

use crate::queue::Located;
use crate::snapshot::{
    DiskRead, NewSnapshot, SnapshotChange, SnapshotCreate, SnapshotInfo, SnapshotSizes, VmStateRead,
};
use crate::status::StatusExtent;
use crate::{Error, Preallocation, Progress, ReadBuf, Result, WriteBuf};

/// An open image. All methods take `&self` and may be called from several threads at once; requests
/// that overlap are ordered by the format, requests that do not may run in parallel.
///
/// Offsets and lengths are bytes of the guest's disk. Requests need no alignment.
pub trait Format: Send + Sync {
    /// The driver's QMP name: "qcow2", "raw".
    fn driver(&self) -> &'static str;

    /// Size of the guest's disk in bytes.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Reads `bufs` one after another from `offset`.
    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()>;

    /// Writes `bufs` one after another at `offset`. Durable only after [`Format::flush`].
    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()>;

    /// Bytes of the clusters that [`Format::write_compressed`] packs; `None` if it cannot.
    fn compressed_cluster(&self) -> Option<u64> {
        None
    }

    /// As [`Format::write`], compressed. The range is made of whole clusters of
    /// [`Format::compressed_cluster`] bytes; the disk's end may cut the last one short. What does not
    /// shrink is stored as it is.
    fn write_compressed(&self, _offset: u64, _bufs: &[WriteBuf<'_>]) -> Result<()> {
        Err(Error::NotSupported(format!("the {} format has no compressed clusters", self.driver())))
    }

    /// Makes every completed write durable.
    fn flush(&self) -> Result<()>;

    /// Tells that the range is not needed. It reads as zeroes afterwards or as before.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Gives the range its own copy of what it reads from the image below; what is read stays the same,
    /// also beside writes. What it has already stays as it is.
    ///
    /// # Errors
    /// Among others if the format has nothing below.
    fn copy_up(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::NotSupported(format!("the {} format has no backing files", self.driver())))
    }

    /// How a range is stored, in order. A call does a bounded amount of work: the list may end before
    /// the range does, but has at least one extent unless the range is empty.
    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(vec![StatusExtent::data(len)]),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }

    /// Gives the disk another size, a multiple of 512 bytes; what is new reads as zeroes. With a mode
    /// its space is taken. The caller sees to it that no request is in flight past a smaller size.
    /// The new size is durable afterwards.
    ///
    /// # Errors
    /// Refusals, with QEMU's texts, and the host's errors. The disk has its old size then, unless it
    /// was to shrink and only giving back space failed.
    fn resize(&self, _size: u64, _mode: Preallocation, _progress: &Progress) -> Result<()> {
        Err(Error::NotSupported("Image format driver does not support resize".to_owned()))
    }

    /// Whether [`Format::write_zeroes`] is faster than writing zeroes.
    fn fast_zeroes(&self) -> bool {
        true
    }

    /// Tells where a range is to be read from, if that can be told without waiting and without I/O:
    /// says whether `out` has it. `out` is empty before, and its holder may transfer the range
    /// until it clears it.
    fn locate_read(&self, _offset: u64, _len: u64, _out: &mut Located) -> bool {
        false
    }

    /// As [`Format::locate_read`] for a write. After the transfers [`Format::finish_write`] must be
    /// called if there are new places in `out`.
    fn locate_write(&self, _offset: u64, _len: u64, _out: &mut Located) -> bool {
        false
    }

    /// Ends a located write that has new places: they come into the tables if all was `written`,
    /// else they are given back. Gives the write's result, or `None` if it would have to wait and
    /// may not; then nothing is done and it must be called again.
    fn finish_write(
        &self,
        _located: &mut Located,
        _written: bool,
        _wait: bool,
    ) -> Option<Result<()>> {
        Some(Ok(()))
    }

    /// Whether the format has internal snapshots.
    fn supports_snapshots(&self) -> bool {
        false
    }

    /// The internal snapshots in table order.
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }

    /// Starts a new internal snapshot of the disk, which must be quiesced until `publish` returns.
    fn create_snapshot(&self, _new: &NewSnapshot) -> Result<Box<dyn SnapshotCreate + '_>> {
        Err(self.no_snapshots())
    }

    /// Starts going back to the snapshot `id` (not a tag).
    fn revert_snapshot(&self, _id: &str) -> Result<Box<dyn SnapshotChange + '_>> {
        Err(self.no_snapshots())
    }

    /// Whether the disk is known to be unchanged since it was that of snapshot `id` (not a tag),
    /// because the snapshot was made or gone back to then.
    fn is_at_snapshot(&self, _id: &str) -> Result<bool> {
        Ok(false)
    }

    /// Starts deleting the snapshot `id` (not a tag).
    fn delete_snapshot(&self, _id: &str) -> Result<Box<dyn SnapshotChange + '_>> {
        Err(self.no_snapshots())
    }

    /// Opens the VM-state area of the snapshot `id` (not a tag) without changing the active disk.
    fn open_vmstate(&self, _id: &str) -> Result<Box<dyn VmStateRead + '_>> {
        Err(self.no_snapshots())
    }

    /// As [`Format::open_vmstate`] without keeping the snapshot from being deleted: for a short look.
    /// A read of one that has gone meanwhile is an error.
    fn look_at_vmstate(&self, id: &str) -> Result<Box<dyn VmStateRead + '_>> {
        self.open_vmstate(id)
    }

    /// How much of the snapshot `id` (not a tag) is its own. Reads all of its tables, letting other
    /// requests in between.
    fn snapshot_sizes(&self, _id: &str) -> Result<SnapshotSizes> {
        Err(self.no_snapshots())
    }

    /// Opens the disk of the snapshot `id` (not a tag) without changing the active disk. While it is
    /// open the snapshot cannot be deleted.
    fn open_snapshot(&self, _id: &str) -> Result<Box<dyn DiskRead + '_>> {
        Err(self.no_snapshots())
    }

    /// The error of a format without snapshots.
    fn no_snapshots(&self) -> Error {
        Error::NotSupported(format!("the {} format has no internal snapshots", self.driver()))
    }
}
