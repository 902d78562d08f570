//! The qcow2 format, versions 2 and 3 (`docs/interop/qcow2.txt` of QEMU).
//!
//! | file | what |
//! |---|---|
//! | `layout` | sizes, table entries |
//! | `header`, `header_write` | the header, checked; rewritten |
//! | `options` | how an image is to be opened |
//! | `cache` | L2 tables and refcount blocks in memory |
//! | `counts` | the refcounts of one block |
//! | `refcount` | references to host clusters, allocation |
//! | `meta`, `meta/sync` | all of these together; the order in which they are written |
//! | `overlap`, `corruption` | keeping writes off the metadata, and telling of damage |
//! | `inflight` | which guest ranges are being worked on |
//! | `subcluster` | what an L2 entry says of the parts of its cluster |
//! | `read`, `compressed`, `write`, `write_compressed`, `zero` | requests |
//! | `status` | what is data and what is zeroes |
//! | `snapshot` | internal snapshots and VM state |
//! | `bitmaps` | persistent dirty bitmaps |
//!
//! Lock order: a range of [`inflight`] first, then a snapshot's own tables, then the metadata
//! mutex. No guest data is transferred while the metadata mutex is held.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::bitmap::BitmapSet;
use crate::format::Format;
use crate::queue::Located;
use crate::snapshot::{
    DiskRead, NewSnapshot, SnapshotChange, SnapshotCreate, SnapshotInfo, SnapshotSizes, VmStateRead,
};
use crate::status::StatusExtent;
use crate::storage::Storage;
use crate::{Error, Preallocation, Progress, ReadBuf, Result, WriteBuf};

mod bitmaps;
mod cache;
pub mod check;
mod compressed;
mod corruption;
mod counts;
pub mod create;
mod header;
mod header_write;
mod inflight;
mod layout;
mod locate;
mod meta;
mod options;
mod overlap;
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
pub use options::{Options, PassDiscard};
pub use overlap::OverlapCheck;
pub(crate) use write::Target;

use header::{Header, autoclear, compatible, field, incompatible};
use layout::Geometry;
use meta::Meta;

/// Requests are worked on in pieces of this many bytes (or one cluster), so that what is kept of
/// one in memory is bounded.
const PIECE: u64 = 4 << 20;

/// The header of an image, read and checked, before its backing file is open.
#[derive(Debug)]
pub struct Probe {
    storage: Arc<dyn Storage>,
    header: Header,
}

impl Probe {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::NotFormat`], [`Error::Corrupt`] or [`Error::NotSupported`], saying what is wrong.
    pub fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = Header::read(&*storage)?;
        Ok(Self { storage, header })
    }

    /// The backing file's name as the image has it.
    pub fn backing_file(&self) -> Option<&str> {
        self.header.backing_file.as_deref()
    }

    /// Whether data clusters are in another file, which must be opened too.
    pub fn needs_data_file(&self) -> bool {
        self.header.geometry.external
    }

    /// That file's name as the image has it, if it has one.
    pub fn data_file(&self) -> Option<String> {
        self.header.data_file()
    }

    /// The backing file's format, where the image tells it.
    pub fn backing_format(&self) -> Option<&str> {
        self.header.backing_format.as_deref()
    }
}

/// What `query-named-block-nodes` tells of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Info {
    /// "0.10" for version 2, "1.1" for version 3.
    pub compat: &'static str,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Whether the image asks for lazy refcounts.
    pub lazy_refcounts: bool,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether the image is marked as corrupt.
    pub corrupt: bool,
    /// Whether the image was not closed properly.
    pub dirty: bool,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// External data file as the image has it.
    pub data_file: Option<String>,
    /// Whether the external data file is kept as a raw image; `None` without one.
    pub data_file_raw: Option<bool>,
    /// Backing file as the image has it.
    pub backing_file: Option<String>,
    /// Backing file's format as the image has it.
    pub backing_format: Option<String>,
}

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
    in_flight: InFlight,
    /// Changed only while no request is under way; the lock is held for a look.
    backing: RwLock<Option<Arc<dyn Format>>>,
    /// The node's bitmaps, those in memory only too.
    bitmaps: Arc<BitmapSet>,
    size: AtomicU64,
    /// A length the file had at some time.
    known_len: AtomicU64,
    read_only: bool,
    unmap: bool,
    /// Discarded clusters keep their place; whether the host's space goes all the same.
    no_unref: Option<bool>,
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
        let Probe { storage, mut header } = probe;
        if options.discard_no_unref && header.geometry.version < 3 {
            return Err(Error::Invalid(
                "discard-no-unref is only supported since qcow2 version 3".to_owned(),
            ));
        }
        let writable = !options.read_only;
        check_data_file(&header, &options)?;
        if writable {
            header = make_writable(&storage, header)?;
        }
        let (geometry, compression, mut size) = (header.geometry, header.compression, header.size);
        let raw_data = geometry.external && header.autoclear & autoclear::RAW_DATA != 0;
        let mut meta = Meta::open(storage.clone(), header, &options)?;
        if let Some(id) = &options.snapshot {
            size = snapshot::view(&mut meta, id)?;
        }
        let mut image = Self {
            data: options.data_file.unwrap_or_else(|| storage.clone()),
            raw_data,
            geometry,
            compression,
            meta: Mutex::new(meta),
            storage,
            in_flight: InFlight::default(),
            backing: RwLock::new(backing),
            bitmaps: Arc::default(),
            size: AtomicU64::new(size),
            known_len: AtomicU64::new(0),
            read_only: options.read_only,
            unmap: true,
            no_unref: options.discard_no_unref.then_some(options.pass_discard.request),
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
    pub fn with_discard(mut self, unmap: bool) -> Self {
        self.unmap = unmap;
        self
    }

    /// Sets who is told when damage is found. It is called with the image's lock held: it must not
    /// use the image.
    pub fn on_corruption(&self, hook: impl Fn(&Corruption) + Send + Sync + 'static) {
        self.meta().listener.set(Box::new(hook));
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

    /// What the header tells.
    pub fn info(&self) -> Qcow2Info {
        let meta = self.meta();
        let header = &meta.header;
        Qcow2Info {
            compat: if header.geometry.version < 3 { "0.10" } else { "1.1" },
            compression: header.compression,
            lazy_refcounts: header.compatible & compatible::LAZY != 0,
            refcount_bits: 1 << header.geometry.refcount_order,
            corrupt: header.incompatible & incompatible::CORRUPT != 0,
            dirty: header.incompatible & incompatible::DIRTY != 0,
            cluster_size: header.geometry.cluster_size(),
            extended_l2: header.geometry.extended,
            data_file: header.data_file(),
            data_file_raw: header.geometry.external.then_some(self.raw_data),
            backing_file: header.backing_file.clone(),
            backing_format: header.backing_format.clone(),
        }
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change of snapshots: gives space back to the host, the end of the file included.
    fn give_space_back(&self) {
        if self.punch_all() {
            self.meta().truncate_tail();
        }
    }

    /// Punches out what was freed, letting requests in between; says whether it could.
    fn punch_all(&self) -> bool {
        loop {
            match self.meta().punch_some() {
                Ok(true) => {}
                Ok(false) => return true,
                Err(e) => {
                    tracing::warn!(image = self.storage.name(), "space is not given back: {e}");
                    return false;
                }
            }
            std::thread::yield_now();
        }
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

/// Refuses an image that only a repair by hand may write to, and repairs one that was not closed
/// properly, whose refcounts may be behind. Gives its header as it is then.
fn make_writable(storage: &Arc<dyn Storage>, header: Header) -> Result<Header> {
    if header.incompatible & incompatible::CORRUPT != 0 {
        return Err(Error::NotSupported(format!(
            "Image '{name}' is marked as corrupt and can be opened read-only only; repair it with: qemu-img check -r all '{name}'",
            name = storage.name()
        )));
    }
    if header.incompatible & incompatible::DIRTY == 0 {
        return Ok(header);
    }
    check::repair_at_open(&**storage)?;
    Header::read(&**storage)
}

/// An image with an external data file needs it; others must not have one. QEMU's texts.
fn check_data_file(header: &Header, options: &Options) -> Result<()> {
    match (header.geometry.external, &options.data_file) {
        (true, None) => Err(Error::Invalid("'data-file' is required for this image".to_owned())),
        (false, Some(_)) => Err(Error::Invalid(
            "'data-file' can only be set for images with an external data file".to_owned(),
        )),
        _ => Ok(()),
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
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
        self.write_disk(offset, bufs)
    }

    fn compressed_cluster(&self) -> Option<u64> {
        (!self.geometry.external).then(|| self.geometry.cluster_size())
    }

    fn write_compressed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.write_packed(offset, bufs)
    }

    fn flush(&self) -> Result<()> {
        let mut meta = self.meta();
        if !meta.writable {
            return Ok(());
        }
        if meta.is_dirty() {
            meta.sync()?;
            // What the guest discarded since the last flush may be much.
            let more = meta.has_freed();
            drop(meta);
            if more {
                self.punch_all();
            }
            return Ok(());
        }
        drop(meta);
        if self.geometry.external {
            self.data.flush()?;
        }
        self.storage.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        if !self.unmap {
            return self.meta().check_writable();
        }
        self.discard_disk(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.zero_disk(offset, len, unmap && self.unmap)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.disk_status(offset, len)
    }

    fn fast_zeroes(&self) -> bool {
        // Version 2 has no zero clusters: over a backing file zeroes are written.
        self.geometry.version >= 3
    }

    fn resize(&self, size: u64, mode: Preallocation, progress: &Progress) -> Result<()> {
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
