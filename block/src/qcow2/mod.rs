//! The qcow2 format, versions 2 and 3 (`docs/interop/qcow2.txt` of QEMU).
//!
//! | file | what |
//! |---|---|
//! | `layout` | sizes, table entries |
//! | `header`, `header_write` | the header, checked; rewritten |
//! | `probe`, `options`, `info` | what the header tells before an image is open; how it is to be opened; what it tells then |
//! | `cache` | L2 tables and refcount blocks in memory |
//! | `counts` | the refcounts of one block |
//! | `refcount` | references to host clusters, allocation |
//! | `meta`, `meta/sync` | all of these together; the order in which they are written |
//! | `overlap`, `corruption` | keeping writes off the metadata, and telling of damage |
//! | `flush` | making all of it durable, while those who only look go on |
//! | `inflight` | which guest ranges are being worked on |
//! | `subcluster` | what an L2 entry says of the parts of its cluster |
//! | `read`, `compressed`, `write`, `write_compressed`, `zero` | requests |
//! | `copy_up` | taking over what the backing file has |
//! | `status` | what is data and what is zeroes |
//! | `snapshot` | internal snapshots and VM state |
//! | `bitmaps` | persistent dirty bitmaps |
//!
//! Lock order: a range of [`inflight`] first, then a snapshot's own tables, then the metadata
//! mutex. No guest data is transferred while the metadata mutex is held, and a flush lets it go while the
//! disk works ([`flush`]).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};

use crate::bitmap::BitmapSet;
use crate::format::Format;
use crate::queue::Located;
use crate::snapshot::{
    DiskRead, NewSnapshot, SnapshotChange, SnapshotCreate, SnapshotInfo, SnapshotSizes, VmStateRead,
};
use crate::stack::deep;
use crate::status::StatusExtent;
use crate::storage::Storage;
use crate::{Error, Preallocation, Progress, ReadBuf, Result, WriteBuf};

mod bitmaps;
mod cache;
pub mod check;
mod compressed;
mod copy_up;
mod corruption;
mod counts;
pub mod create;
mod flush;
mod header;
mod header_write;
mod inflight;
mod info;
mod layout;
mod locate;
mod meta;
mod options;
mod overlap;
mod probe;
mod read;
mod refcount;
mod resize;
mod snapshot;
mod status;
mod subcluster;
mod write;
mod write_compressed;
mod zero;

pub use bitmaps::StoredBitmap;
pub use corruption::Corruption;
pub use header::Compression;
pub(crate) use inflight::{Held, InFlight};
pub use info::Qcow2Info;
pub use options::{Options, PassDiscard};
pub use overlap::OverlapCheck;
pub use probe::Probe;
pub(crate) use write::Target;

use header::{autoclear, field};
use layout::Geometry;
use meta::Meta;

/// Requests are worked on in pieces of this many bytes (or one cluster), so that what is kept of
/// one in memory is bounded.
const PIECE: u64 = 4 << 20;

/// An open qcow2 image.
pub struct Qcow2 {
    storage: Arc<dyn Storage>,
    /// Where data clusters are that are not compressed: `storage`, or an external data file.
    data: Arc<dyn Storage>,
    /// The external data file is kept as a raw image of what the guest sees.
    raw_data: bool,
    geometry: Geometry,
    compression: Compression,
    meta: Mutex<Meta>,
    /// Told when the tables may be changed again.
    thawed: Condvar,
    /// How many wait for `meta`.
    waiters: AtomicUsize,
    in_flight: InFlight,
    /// Changed only while no request is under way; the lock is held for a look.
    backing: RwLock<Option<Arc<dyn Format>>>,
    /// The node's bitmaps, those in memory only too.
    bitmaps: Arc<BitmapSet>,
    /// Whether `meta` says why they are not marked: looked at by every write.
    unmarked: AtomicBool,
    size: AtomicU64,
    /// A length the file had at some time.
    known_len: AtomicU64,
    read_only: bool,
    unmap: bool,
    /// Zeroes are its own also where nothing is below it: [`Qcow2::record_zeroes`].
    records_zeroes: AtomicBool,
    /// Discarded clusters keep their place; whether the host's space goes all the same.
    no_unref: Option<bool>,
    /// The image itself, once it is shared: for who flushes another that changed with it.
    me: Weak<Qcow2>,
}

impl Qcow2 {
    /// Opens the image over its backing file, if there is one.
    ///
    /// # Errors
    /// For writing: images that are marked as corrupt, or that were not closed properly and cannot be
    /// repaired.
    pub fn open(probe: Probe, backing: Option<Arc<dyn Format>>, read_only: bool) -> Result<Self> {
        Self::open_with(probe, backing, Options { read_only, ..Options::default() })
    }

    /// As [`Qcow2::open`], with all options.
    ///
    /// # Errors
    /// As for [`Qcow2::open`].
    pub fn open_with(
        probe: Probe,
        backing: Option<Arc<dyn Format>>,
        options: Options,
    ) -> Result<Self> {
        let (storage, mut header) = probe.into_parts();
        if options.discard_no_unref && header.geometry.version < 3 {
            return Err(Error::Invalid(
                "discard-no-unref is only supported since qcow2 version 3".to_owned(),
            ));
        }
        let writable = !options.read_only;
        probe::check_data_file(&header, &options)?;
        if writable {
            header = probe::make_writable(&storage, header)?;
        }
        let (geometry, compression, mut size) = (header.geometry, header.compression, header.size);
        let raw_data = geometry.external && header.autoclear & autoclear::RAW_DATA != 0;
        let mut meta = Meta::open(storage.clone(), header, &options)?;
        if let Some(id) = &options.snapshot {
            size = snapshot::view(&mut meta, id, options.snapshot_date.as_deref())?;
        }
        let mut image = Self {
            data: options.data_file.unwrap_or_else(|| storage.clone()),
            raw_data,
            geometry,
            compression,
            meta: Mutex::new(meta),
            thawed: Condvar::new(),
            waiters: AtomicUsize::new(0),
            storage,
            in_flight: InFlight::default(),
            backing: RwLock::new(backing),
            bitmaps: Arc::default(),
            size: AtomicU64::new(size),
            known_len: AtomicU64::new(0),
            unmarked: AtomicBool::new(false),
            read_only: options.read_only,
            unmap: true,
            records_zeroes: AtomicBool::new(false),
            no_unref: options.discard_no_unref.then_some(options.pass_discard.request),
            me: Weak::new(),
        };
        let meta = image.meta.get_mut().unwrap_or_else(PoisonError::into_inner);
        if options.snapshot.is_none() {
            // They are the active disk's.
            image.bitmaps = Arc::new(bitmaps::load(meta)?);
        }
        if writable {
            image.clear_autoclear()?;
        }
        Ok(image)
    }

    /// Whether discards reach the image (QEMU's `discard=unmap`) or do nothing.
    #[must_use]
    pub(crate) fn with_discard(mut self, unmap: bool) -> Self {
        self.unmap = unmap;
        self
    }

    /// The image for several users. Only one that is shared so follows, when another flushes that went back
    /// to a snapshot with it ([`crate::Together`]).
    pub fn into_shared(mut self) -> Arc<Self> {
        Arc::new_cyclic(|me| {
            self.me = me.clone();
            self
        })
    }

    /// Sets who is told when damage is found. It is called with the image's lock held: it must not
    /// use the image.
    pub fn on_corruption(&self, hook: impl Fn(&Corruption) + Send + Sync + 'static) {
        self.meta().listener.set(Box::new(hook));
    }

    /// Whether the image takes no writes: it was opened for reading, or was found damaged since.
    pub(crate) fn refuses_writes(&self) -> bool {
        self.meta().check_writable().is_err()
    }

    /// Writes everything that is in memory, as closing would, and takes the dirty bit back: for
    /// another who is to read the image. It goes on working.
    ///
    /// # Errors
    /// If a write or a flush fails; what is not written stays in memory.
    pub fn settle(&self) -> Result<()> {
        let mut meta = self.meta();
        if meta.writable { meta.close() } else { Ok(()) }
    }

    /// Changes the backing file that the image names, not the one that is open. Durable when this
    /// returns; a crash leaves the old name or the new one.
    ///
    /// # Errors
    /// If the name is longer than 1023 bytes or does not fit the header's cluster, or the image is
    /// read-only.
    pub fn set_backing(&self, name: Option<&str>, format: Option<&str>) -> Result<()> {
        let mut meta = self.meta();
        meta.check_writable()?;
        meta.update_header(|header| header.set_backing(name, format))
    }

    /// What is read where the image has nothing itself.
    fn backing(&self) -> Option<Arc<dyn Format>> {
        self.backing.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another image below, with no request under way; gives the one there was.
    pub(crate) fn replace_backing(
        &self,
        backing: Option<Arc<dyn Format>>,
    ) -> Option<Arc<dyn Format>> {
        let mut place = self.backing.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *place, backing)
    }

    /// Clears the bits of features that writes here do not keep up to date, so that their data counts
    /// as out of date ("autoclear_features"). That of bitmaps stays if they were read.
    fn clear_autoclear(&mut self) -> Result<()> {
        let meta = self.meta.get_mut().unwrap_or_else(PoisonError::into_inner);
        let raw = if self.raw_data { autoclear::RAW_DATA } else { 0 };
        let kept = meta.bitmaps.autoclear() | (meta.header.autoclear & raw);
        if meta.header.autoclear != kept {
            meta.write_field(field::AUTOCLEAR, &kept.to_be_bytes())?;
            // Before any data: a power failure must not keep new data and the old bits.
            meta.storage.flush()?;
            meta.header.autoclear = kept;
        }
        Ok(())
    }

    /// The bitmaps of the disk.
    pub(crate) fn bitmaps(&self) -> &Arc<BitmapSet> {
        &self.bitmaps
    }

    fn disk_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.disk_size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }

    /// How much of a request to do at once: up to a cluster boundary.
    fn piece(&self, offset: u64, len: u64) -> u64 {
        let most = PIECE.max(self.geometry.cluster_size());
        let end = self.geometry.cluster_start(offset) + most;
        len.min(end - offset)
    }

    /// The whole clusters around a guest range.
    fn clusters_of(&self, offset: u64, len: u64) -> Range<u64> {
        let size = self.geometry.cluster_size();
        self.geometry.cluster_start(offset)..(offset + len).next_multiple_of(size)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        self.end();
        let below = self.backing.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // It may be the last handle of the image below, and so on.
        deep(|| drop(below));
    }
}

impl Qcow2 {
    /// Writes what is still only in memory.
    fn end(&mut self) {
        let meta = self.meta.get_mut().unwrap_or_else(PoisonError::into_inner);
        if meta.writable
            && meta.is_dirty()
            && let Err(e) = meta.sync()
        {
            tracing::error!(image = self.storage.name(), "changes are lost: {e}");
            return;
        }
        if let Err(e) = self.store_bitmaps() {
            tracing::error!(
                image = self.storage.name(),
                "bitmaps are out of date from now on: {e}"
            );
        }
        let meta = self.meta.get_mut().unwrap_or_else(PoisonError::into_inner);
        if meta.writable
            && let Err(e) = meta.close()
        {
            tracing::error!(image = self.storage.name(), "the image stays marked as dirty: {e}");
        }
    }
}

impl Format for Qcow2 {
    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn size(&self) -> u64 {
        self.disk_size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.read_disk(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.mark_bitmaps_left()?;
        self.write_disk(offset, bufs)
    }

    fn compressed_cluster(&self) -> Option<u64> {
        (!self.geometry.external).then(|| self.geometry.cluster_size())
    }

    fn write_compressed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.mark_bitmaps_left()?;
        self.write_packed(offset, bufs)
    }

    fn flush(&self) -> Result<()> {
        self.flush_disk()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        self.mark_bitmaps_left()?;
        if !self.unmap {
            return self.meta().check_writable();
        }
        self.discard_disk(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.mark_bitmaps_left()?;
        self.zero_disk(offset, len, unmap && self.unmap)
    }

    fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        self.mark_bitmaps_left()?;
        self.take_over(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.disk_status(offset, len)
    }

    fn fast_zeroes(&self) -> bool {
        // Version 2 has no zero clusters: over a backing file zeroes are written.
        self.geometry.version >= 3
    }

    fn resize(&self, size: u64, mode: Preallocation, progress: &Progress) -> Result<()> {
        self.mark_bitmaps_left()?;
        self.resize_disk(size, mode, progress)
    }

    fn locate_read(&self, offset: u64, len: u64, out: &mut Located) -> bool {
        self.locate_disk_read(offset, len, out)
    }

    fn locate_write(&self, offset: u64, len: u64, out: &mut Located) -> bool {
        self.locate_disk_write(offset, len, out)
    }

    fn finish_write(&self, located: &mut Located, written: bool, wait: bool) -> Option<Result<()>> {
        self.finish_disk_write(&located.targets, written, wait)
    }

    fn supports_snapshots(&self) -> bool {
        !self.geometry.external
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.meta().snapshots.iter().map(|s| s.info.clone()).collect()
    }

    fn create_snapshot(&self, new: &NewSnapshot) -> Result<Box<dyn SnapshotCreate + '_>> {
        Ok(Box::new(snapshot::Create::begin(self, new)?))
    }

    fn revert_snapshot(&self, id: &str) -> Result<Box<dyn SnapshotChange + '_>> {
        Ok(Box::new(snapshot::Revert::begin(self, id)?))
    }

    fn is_at_snapshot(&self, id: &str) -> Result<bool> {
        snapshot::is_current(self, id)
    }

    fn delete_snapshot(&self, id: &str) -> Result<Box<dyn SnapshotChange + '_>> {
        Ok(Box::new(snapshot::Delete::begin(self, id)?))
    }

    fn open_vmstate(&self, id: &str) -> Result<Box<dyn VmStateRead + '_>> {
        Ok(Box::new(snapshot::VmState::open(self, id)?))
    }

    fn look_at_vmstate(&self, id: &str) -> Result<Box<dyn VmStateRead + '_>> {
        Ok(Box::new(snapshot::VmState::look_at(self, id)?))
    }

    fn snapshot_sizes(&self, id: &str) -> Result<SnapshotSizes> {
        snapshot::sizes(self, id)
    }

    fn open_snapshot(&self, id: &str) -> Result<Box<dyn DiskRead + '_>> {
        Ok(Box::new(snapshot::SnapshotDisk::open(self, id)?))
    }
}
