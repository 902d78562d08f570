//! Internal snapshots as seen from outside a format: what they are, and how they change.
//!
//! A change to the snapshots of one image is taken in steps so that a caller can make the same
//! change on several images and have it on all of them or on none:
//!
//! ```text
//!  begin ──(switch)──> prepare ──(show)──> publish ──> finish
//!    │         │          │         │          │
//!    └─────────┴──────────┴─────────┴──────────┴──> rollback
//! ```
//!
//! `prepare` does everything that can fail and makes it durable: new tables, refcounts. `publish`
//! is one header write that makes the change visible, then a flush. `finish` gives back what the
//! change left without an owner; it cannot undo. `rollback` from any step before `finish` leaves
//! the image as it was, with what was written to the disk meanwhile. Dropping a change without `finish` rolls it back. A crash at any point
//! leaves the old or the new state, and at most leaked clusters.

use std::sync::Arc;

use crate::qcow2::Compression;
use crate::{Error, ReadBuf, Result, StatusExtent, Together, WriteBuf};

/// An internal snapshot, as the snapshot table tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in its image.
    pub id: String,
    /// What people call it; QEMU's "name".
    pub tag: String,
    /// Length of the VM state in bytes; 0 for a disk-only snapshot.
    pub vm_state_size: u64,
    /// Size of the disk at that time, in bytes.
    pub disk_size: u64,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds within the second.
    pub date_nsec: u32,
    /// Time the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction counter, where the machine had one.
    pub icount: Option<u64>,
}

impl SnapshotInfo {
    /// When it was made, in seconds since the epoch with nine decimals. With the id it names one snapshot,
    /// whatever is deleted and made.
    pub fn date_text(&self) -> String {
        format!("{}.{:09}", self.date_sec, self.date_nsec)
    }
}

/// How much of a snapshot is its own, in bytes of whole clusters, tables included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SnapshotSizes {
    /// Of the disk.
    pub disk: Share,
    /// Of the VM-state area.
    pub vm_state: Share,
}

/// What is stored for a part of a snapshot, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// Nobody else's: what a deletion gives back.
    pub alone: u64,
    /// Referred to by other snapshots or the active disk, too.
    pub shared: u64,
}

/// What the caller says of a snapshot to be made. The image gives it its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Tag; at most 255 bytes are kept.
    pub tag: String,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds within the second.
    pub date_nsec: u32,
    /// Time the guest has been running, in nanoseconds.
    pub vm_clock_nsec: u64,
}

/// A change to an image's snapshots that is under way; see the module's diagram.
pub trait SnapshotChange: Send {
    /// Does all that can fail and makes it durable. The image still shows the old state.
    fn prepare(&mut self) -> Result<()>;
    /// Makes the change visible in memory, which takes no time that a guest would notice: for a guest that
    /// stands still meanwhile. The disk follows with [`SnapshotChange::publish`], or with a flush
    /// that comes before; after a crash until then the change was not made. No flush returns before all of
    /// `together` have followed. A change that cannot be made visible alone does nothing.
    ///
    /// # Errors
    /// Nothing has changed.
    fn show(&mut self, together: &Arc<Together>) -> Result<()> {
        together.settled();
        Ok(())
    }
    /// Makes the change visible and durable.
    ///
    /// # Errors
    /// The change is to be rolled back. One that was shown, and that a guest has seen, stays: the next flush
    /// tries again.
    fn publish(&mut self) -> Result<()>;
    /// Gives back what the change left without an owner. An error here leaks clusters only.
    fn finish(&mut self) -> Result<()>;
    /// Undoes the change; what it took is given back.
    fn rollback(&mut self) -> Result<()>;
}

/// A snapshot being made; it may carry VM state.
///
/// VM state is written and zeroed in pages of 4096 bytes, or in clusters where these are smaller:
/// offsets and lengths must be multiples of that. Writing and zeroing may be called from many threads
/// at once for ranges that share no cluster.
pub trait SnapshotCreate: SnapshotChange + Sync {
    /// Starts with the VM state of snapshot `id` of the same image, before any is written; gives its
    /// length in bytes, which becomes the length of this one. What is not written or zeroed afterwards
    /// is shared with it and takes no more space, and either may be deleted first.
    ///
    /// # Errors
    /// Among others if the format cannot share VM state.
    fn inherit_vmstate(&mut self, _id: &str) -> Result<u64> {
        Err(Error::NotSupported("This image format cannot share VM state".to_owned()))
    }

    /// Writes VM state at `offset` bytes from the start of the VM-state area, also where there is some
    /// already. A cluster that is written in part keeps the rest, which may have to be read from
    /// where it is inherited from. What is never written reads as zeroes and takes no space. Buffers
    /// aligned to 4096 bytes go to the host without a copy. After an error the range has anything.
    fn write_vmstate(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()>;

    /// Makes a part of the VM state read as zeroes. Whole clusters of it take no space afterwards.
    fn zero_vmstate(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::NotSupported("This image format cannot zero VM state".to_owned()))
    }

    /// The snapshot point: the snapshot has the disk as it is now, whatever is written to it before or
    /// during `prepare`, which otherwise has its point at its start. Changes memory only, so that a
    /// guest that stands still for it need not stand still for `prepare`; waits for requests in flight.
    /// VM state may be written before and after.
    ///
    /// # Errors
    /// If it was called before, or the image takes no writes.
    fn switch(&self) -> Result<()>;

    /// Has what is written from now on compressed by the image's method, which must be this one: cluster by
    /// cluster where whole ones are written. What is written in part, or does not shrink, is stored as
    /// it is.
    ///
    /// # Errors
    /// If the image's method is another.
    fn compress_vmstate(&mut self, _method: Compression) -> Result<()> {
        Err(Error::NotSupported("This image format cannot compress VM state".to_owned()))
    }

    /// Bytes by which compression has made what was written shorter.
    fn spared_bytes(&self) -> u64 {
        0
    }

    /// The length recorded in the snapshot table; at least the end of what was written. Inherited VM
    /// state past it is left out.
    fn set_vmstate_size(&mut self, size: u64);

    /// Replaces the times given at the start: see [`NewSnapshot`].
    fn set_time(&mut self, date_sec: u32, date_nsec: u32, vm_clock_nsec: u64);

    /// Cluster size of the image in bytes.
    fn cluster_size(&self) -> u64;
}

/// A part of a VM-state area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmStateExtent {
    /// Offset from the start of the VM-state area in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether nothing is stored and the part reads as zeroes.
    pub zero: bool,
}

/// A part of a VM-state area that the image's file has as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmStatePlace {
    /// Offset from the start of the VM-state area in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the file in bytes.
    pub host: u64,
}

/// A disk that is read only: that of a snapshot.
pub trait DiskRead: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;
    /// Reads `bufs` one after another from `offset`; callable from many threads at once.
    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()>;
    /// As [`crate::Format::block_status`].
    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>>;
}

/// The VM-state area of one snapshot.
pub trait VmStateRead: Send + Sync {
    /// Length in bytes as recorded in the snapshot table.
    fn size(&self) -> u64;
    /// Reads `bufs` one after another from `offset`; callable from many threads at once.
    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()>;
    /// How the range is stored, in order, adjacent parts of one kind merged, covering it wholly.
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<VmStateExtent>>;
    /// The parts of a range that the image's file has as they are, in order, those in a row in the
    /// file merged. What is there stays there while the snapshot cannot be deleted.
    fn places(&self, _offset: u64, _len: u64) -> Result<Vec<VmStatePlace>> {
        Ok(Vec::new())
    }
}
