//! The image's metadata in memory, and the order in which it reaches the disk.
//!
//! Everything here is behind one mutex that is never held during transfers of guest data.
//!
//! **Order of writes.** Tables are changed in memory and written by [`Meta::sync`]:
//!
//! 1. refcount blocks, then new refcount table entries: references may be counted too high on disk.
//!    What cannot be written in place comes with it (`switch`);
//! 2. flush: guest data and refcounts are durable;
//! 3. L2 tables; flush if there are new ones; the L1 entries that refer to them;
//! 4. flush: what the guest wrote is durable;
//! 5. references that were taken out of L2 tables are given back ([`Meta::defer_free`]).
//!
//! With lazy refcounts ([`Meta::write_counts`]) step 1 sets the dirty bit instead of writing counts.
//!
//! So on disk every reference is counted, and a crash leaves leaked clusters at most. A cluster
//! taken out of a table cannot be used again before step 5, so the old table on disk stays true.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::storage::Storage;
use crate::{Error, Result, WriteBuf};

use super::cache::TableCache;
use super::corruption::{Corruption, Listener};
use super::header::{Header, MAX_L1_BYTES, compatible, field, incompatible};
use super::layout::{Geometry, HostOffset, Run, table_of};
use super::options::{Options, PassDiscard};
use super::overlap::{OverlapCheck, Places, Ranges};
use super::refcount::Refcounts;
use super::snapshot::Entry;

mod give_back;
mod space;
mod switch;
mod sync;
mod tables;

pub(super) use give_back::discard;
pub(super) use sync::Sync;
pub(super) use tables::{check_l1, read_l1};

/// The metadata of an open image; the module has the order of its writes.
#[derive(Debug)]
pub(super) struct Meta {
    pub(crate) storage: Arc<dyn Storage>,
    /// Where data clusters are, if not in `storage`.
    data: Option<Arc<dyn Storage>>,
    pub(crate) header: Header,
    pub(crate) l1: Vec<u64>,
    l1_dirty: Option<Range<usize>>,
    /// Where the L1 table goes, as a whole, at the next switch.
    next_l1: Option<Run>,
    l2: TableCache,
    pub(crate) refcounts: Refcounts,
    /// To be given back by the next sync: first those whose host space goes too.
    pending: [Vec<Run>; 2],
    pub(crate) pass_discard: PassDiscard,
    /// End of the bytes that were taken last for a compressed cluster, within a host cluster.
    pub(crate) packed_end: Option<HostOffset>,
    clean_interval: Option<Duration>,
    cleaned: Instant,
    /// Clusters without references whose host space is not given back yet.
    freed: Vec<Run>,
    pub(crate) snapshots: Vec<Entry>,
    pub(crate) snapshot_table: Option<Run>,
    /// A header write failed and could not be taken back: the disk may have another L1 table or
    /// snapshot table, whose clusters are kept. [`Meta::sync`] settles it.
    pub(crate) unsettled: bool,
    /// Counts of clusters of the active disk went down, and an error kept their entries from getting
    /// COPIED flags. [`Meta::sync`] tries again.
    pub(crate) flags_lag: bool,
    /// A change of the snapshots is under way.
    pub(crate) changing: bool,
    /// The images of which none is durably flushed before all have what memory shows.
    pub(crate) member: Option<super::flush::Member>,
    /// A snapshot being made has its point behind it.
    pub(crate) point: Option<super::snapshot::Point>,
    /// Ids of the snapshots whose VM state is open, once per opener.
    pub(crate) readers: Vec<String>,
    pub(crate) writable: bool,
    /// What needs the tables as they are is under way; see [`super::flush`].
    pub(crate) frozen: bool,
    /// Refcounts may be behind on disk while the dirty bit is set.
    lazy: bool,
    /// What made the image corrupt; writes are refused from then on.
    broken: Option<String>,
    /// Why bitmaps that follow writes may look valid on disk: writes are refused until they are marked.
    pub(crate) unmarked: Option<String>,
    pub(crate) places: Places,
    /// The directory of persistent bitmaps, as it is on disk.
    pub(crate) bitmaps: super::bitmaps::Directory,
    pub(crate) listener: Arc<Listener>,
    /// Whether damage of a read-only image was told.
    told: bool,
}

/// Whether refcounts are written lazily: as the options say, else as the image does.
fn lazy_refcounts(header: &Header, options: &Options) -> Result<bool> {
    let lazy = options.lazy_refcounts.unwrap_or(header.compatible & compatible::LAZY != 0);
    if lazy && header.geometry.version < 3 {
        return Err(Error::Invalid(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
                .to_owned(),
        ));
    }
    Ok(lazy)
}

impl Meta {
    /// Reads the tables of an image.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        header: Header,
        options: &Options,
    ) -> Result<Self> {
        let writable = !options.read_only;
        let lazy = lazy_refcounts(&header, options)?;
        let sizes = options.cache_sizes(header.size, header.geometry)?;
        let refcounts = Refcounts::open(&storage, &header, sizes.refcount)?;
        if writable {
            refcounts.check_blocks()?;
        }
        let l1 = read_l1(&*storage, header.l1_offset, header.l1_size)?;
        check_l1(&*storage, header.geometry, "the L1 table", &l1)?;
        let (snapshots, snapshot_table) = super::snapshot::read_table(&*storage, &header)?;
        let l2 = TableCache::new(header.geometry.cluster_size(), sizes.l2)
            .with_entry_words(header.geometry.entry_words());
        let mut meta = Self {
            storage,
            data: options.data_file.clone(),
            header,
            l1,
            l1_dirty: None,
            next_l1: None,
            l2,
            refcounts,
            pending: Default::default(),
            pass_discard: options.pass_discard,
            packed_end: None,
            clean_interval: options.cache_clean_interval.filter(|t| !t.is_zero()),
            cleaned: Instant::now(),
            freed: Vec::new(),
            snapshots,
            snapshot_table,
            unsettled: false,
            flags_lag: false,
            changing: false,
            member: None,
            point: None,
            readers: Vec::new(),
            writable,
            frozen: false,
            lazy,
            broken: None,
            unmarked: None,
            places: Places { check: options.overlap_check, ..Places::default() },
            bitmaps: super::bitmaps::Directory::default(),
            listener: Arc::default(),
            told: false,
        };
        if writable {
            meta.find_places()?;
        }
        Ok(meta)
    }

    /// Notes where tables are. Only an image that is written to needs it.
    fn find_places(&mut self) -> Result<()> {
        let geometry = self.geometry();
        for table in self.l1.iter().copied().filter_map(table_of) {
            self.places.l2.insert(geometry.cluster_of(table));
        }
        self.note_snapshots();
        self.places.bitmap_directory = self.header.bitmap_directory().map(|(offset, bytes)| Run {
            first: geometry.cluster_of(HostOffset(offset)),
            count: geometry.clusters(bytes),
        });
        if self.places.check.contains(OverlapCheck::INACTIVE_L2) {
            super::snapshot::note_inactive_l2(self)?;
        }
        // Blocks are written without further looks: no other table may be in one's place.
        for block in self.refcounts.block_runs() {
            let but = OverlapCheck::REFCOUNT_BLOCK;
            if let Some(kind) = self.overlap(block, but) {
                return Err(self.damaged(format!(
                    "the refcount block at {:#x} overlaps with {}",
                    geometry.offset_of(block.first),
                    kind.title()
                )));
            }
        }
        Ok(())
    }

    /// Notes the places of the snapshots' L1 tables, after these changed.
    pub(crate) fn note_snapshots(&mut self) {
        let geometry = self.geometry();
        // A larger table than this is refused when the snapshot is used.
        let runs = self.snapshots.iter().filter(|e| u64::from(e.l1_size) * 8 <= MAX_L1_BYTES);
        let run = |e: &Entry| Run {
            first: geometry.cluster_of(HostOffset(e.l1_offset)),
            count: geometry.clusters(u64::from(e.l1_size) * 8),
        };
        self.places.inactive_l1 = Ranges::new(runs.map(run).collect());
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// The clusters of the active L1 table.
    pub(crate) fn l1_run(&self) -> Run {
        let geometry = self.geometry();
        Run {
            first: geometry.cluster_of(HostOffset(self.header.l1_offset)),
            count: geometry.clusters(u64::from(self.header.l1_size) * 8),
        }
    }

    /// The error for a broken rule. A writable image is marked, so that nobody writes to it before
    /// it is repaired (specification: incompatible feature bit 1).
    pub(crate) fn corrupt(&mut self, reason: impl Into<String>) -> Error {
        self.corrupt_at(reason, None)
    }

    /// As [`Meta::corrupt`], for a write that was prevented.
    fn corrupt_at(&mut self, reason: impl Into<String>, at: Option<Run>) -> Error {
        let reason = reason.into();
        let geometry = self.geometry();
        let fatal = self.writable;
        if if fatal { self.broken.is_none() } else { !std::mem::replace(&mut self.told, true) } {
            self.listener.tell(&Corruption {
                reason: reason.clone(),
                offset: at.map(|run| geometry.offset_of(run.first).0),
                size: at.map(|run| geometry.bytes_of(run.count)),
                fatal,
            });
        }
        if fatal && self.broken.is_none() {
            tracing::error!(image = self.storage.name(), %reason, "image is corrupt, writes are refused from now on");
            self.broken = Some(reason.clone());
            if geometry.version >= 3 {
                self.header.incompatible |= incompatible::CORRUPT;
                let bits = self.header.incompatible;
                // Durable at once: nobody may take the image for sound after a crash.
                let marked = self.write_field(field::INCOMPATIBLE, &bits.to_be_bytes());
                if let Err(e) = marked.and_then(|()| self.storage.flush()) {
                    tracing::error!("could not mark the image as corrupt: {e}");
                }
            }
        }
        Error::Corrupt { filename: self.storage.name().to_owned(), reason }
    }

    /// The error for a broken rule below a snapshot: the active disk may be whole, so its user goes on.
    pub(crate) fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Corrupt { filename: self.storage.name().to_owned(), reason: reason.into() }
    }

    /// Refuses changes of an image that is read-only, was found corrupt, or has bitmaps that would not follow
    /// them.
    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_sound()?;
        match &self.unmarked {
            Some(error) => Err(Error::Io {
                operation: "marking bitmaps as in use",
                filename: self.storage.name().to_owned(),
                offset: self.bitmaps.offset(),
                source: io::Error::other(error.clone()),
            }),
            None => Ok(()),
        }
    }

    /// Refuses what changes the file but not the disk, of an image that is read-only or was found corrupt.
    pub(crate) fn check_sound(&self) -> Result<()> {
        match &self.broken {
            _ if !self.writable => Err(Error::ReadOnly(self.storage.name().to_owned())),
            Some(reason) => Err(self.damaged(reason)),
            None => Ok(()),
        }
    }

    /// Passes an error on; one that tells of corruption marks the image.
    pub(crate) fn noted<T>(&mut self, result: Result<T>) -> Result<T> {
        match result {
            Err(Error::Corrupt { reason, .. }) => Err(self.corrupt(reason)),
            other => other,
        }
    }

    /// Changes what the header's first cluster holds besides the fixed fields: extensions, backing
    /// file, feature bits. Durable when this returns; see [`Header::write`] for the order.
    pub(crate) fn update_header(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = self.header.clone();
        change(&mut header);
        if let Err(e) = header.write(&*self.storage) {
            self.header.doubtful = true;
            return Err(e);
        }
        self.header = header;
        Ok(())
    }

    /// After a failed [`Meta::update_header`]: makes sure that the disk has the header that memory
    /// has, durably.
    pub(crate) fn settle_header(&mut self) -> Result<()> {
        if self.header.doubtful { self.update_header(|_| ()) } else { Ok(()) }
    }

    /// Writes bytes of the header.
    pub(crate) fn write_field(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(at, &[WriteBuf::new(bytes)])
    }
}
