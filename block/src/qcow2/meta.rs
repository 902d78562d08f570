//! The image's metadata in memory, and the order in which it reaches the disk.
//!
//! Everything here is behind one mutex that is never held during transfers of guest data.
//!
//! **Order of writes.** Tables are changed in memory and written by [`Meta::sync`]:
//!
//! 1. refcount blocks, then new refcount table entries: references may be counted too high on disk;
//! 2. flush: guest data and refcounts are durable;
//! 3. L2 tables; flush if there are new ones; the L1 entries that refer to them;
//! 4. flush: what the guest wrote is durable;
//! 5. references that were taken out of L2 tables are given back ([`Meta::defer_free`]).
//!
//! With lazy refcounts ([`Meta::write_counts`]) step 1 sets the dirty bit instead of writing counts.
//!
//! So on disk every reference is counted, and a crash leaves leaked clusters at most. A cluster
//! taken out of a table cannot be used again before step 5, so the old table on disk stays true.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::num::{to_u64, to_usize};
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result, WriteBuf};

use super::cache::{Table, TableCache};
use super::corruption::{Corruption, Listener};
use super::header::{Header, MAX_L1_BYTES, compatible, field, incompatible};
use super::layout::{COPIED, Geometry, HostCluster, HostOffset, Run, push_run, table_of};
use super::options::{Options, PassDiscard};
use super::overlap::{OverlapCheck, Places, Ranges};
use super::refcount::Refcounts;
use super::snapshot::Entry;
use super::subcluster::Cluster;

mod sync;

/// See the module.
#[derive(Debug)]
pub(super) struct Meta {
    pub(crate) storage: Arc<dyn Storage>,
    /// Where data clusters are, if not in `storage`.
    data: Option<Arc<dyn Storage>>,
    pub(crate) header: Header,
    pub(crate) l1: Vec<u64>,
    l1_dirty: Option<Range<usize>>,
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
    /// Ids of the snapshots whose VM state is open, once per opener.
    pub(crate) readers: Vec<String>,
    pub(crate) writable: bool,
    /// Refcounts may be behind on disk while the dirty bit is set.
    lazy: bool,
    /// What made the image corrupt; writes are refused from then on.
    broken: Option<String>,
    pub(crate) places: Places,
    /// The directory of persistent bitmaps, as it is on disk.
    pub(crate) bitmaps: super::bitmaps::Directory,
    pub(crate) listener: Arc<Listener>,
    /// Whether damage of a read-only image was told.
    told: bool,
}

impl Meta {
    /// Reads the tables of an image.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        header: Header,
        options: &Options,
    ) -> Result<Self> {
        let writable = !options.read_only;
        let lazy = options.lazy_refcounts.unwrap_or(header.compatible & compatible::LAZY != 0);
        if lazy && header.geometry.version < 3 {
            return Err(Error::Invalid(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
                    .to_owned(),
            ));
        }
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
            readers: Vec::new(),
            writable,
            lazy,
            broken: None,
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

    /// Refuses changes from now on, because the image could not be made ready for them.
    pub(crate) fn refuse_writes(&mut self, reason: &str) {
        self.broken.get_or_insert_with(|| reason.to_owned());
    }

    /// Refuses changes of an image that is read-only or was found corrupt.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::ReadOnly(self.storage.name().to_owned()));
        }
        match &self.broken {
            Some(reason) => Err(Error::Corrupt {
                filename: self.storage.name().to_owned(),
                reason: reason.clone(),
            }),
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

    /// The tables whose places the header gives.
    fn top_tables(&self) -> [(OverlapCheck, Option<Run>); 5] {
        [
            (OverlapCheck::MAIN_HEADER, Some(Run::one(HostCluster(0)))),
            (OverlapCheck::ACTIVE_L1, Some(self.l1_run())),
            (OverlapCheck::REFCOUNT_TABLE, Some(self.refcounts.table_run())),
            (OverlapCheck::SNAPSHOT_TABLE, self.snapshot_table),
            (OverlapCheck::BITMAP_DIRECTORY, self.places.bitmap_directory),
        ]
    }

    /// The kind of metadata that a run's clusters hold; `but` is not looked for.
    fn overlap(&self, run: Run, but: OverlapCheck) -> Option<OverlapCheck> {
        let wanted = self.places.check - but;
        self.places.find(&self.top_tables(), run, wanted).or_else(|| {
            let blocks = OverlapCheck::REFCOUNT_BLOCK;
            (wanted.contains(blocks) && self.refcounts.has_block_in(run)).then_some(blocks)
        })
    }

    /// Refuses a write to clusters that hold metadata of a kind that `overlap-check` has.
    pub(crate) fn check_overlap(&mut self, run: Run) -> Result<()> {
        self.check_overlap_but(run, OverlapCheck::empty())
    }

    /// As [`Meta::check_overlap`], for a write of metadata of one kind to its own place.
    pub(crate) fn check_overlap_but(&mut self, run: Run, but: OverlapCheck) -> Result<()> {
        match self.overlap(run, but) {
            Some(kind) => Err(self.corrupt_at(kind.prevented(), Some(run))),
            None => Ok(()),
        }
    }

    /// Takes free clusters; see [`Refcounts::allocate`].
    pub(crate) fn allocate(&mut self, want: u64, exact: bool) -> Result<Run> {
        let top = self.top_tables();
        let places = &self.places;
        let taken =
            self.refcounts.allocate(want, exact, &|run| places.find(&top, run, places.check));
        self.noted(taken)
    }

    /// Adds a reference to each cluster.
    pub(crate) fn add_refs(&mut self, run: Run) -> Result<()> {
        let added = self.refcounts.add(run);
        self.noted(added)
    }

    /// Gives references back at once: for clusters that nothing on disk refers to.
    pub(crate) fn free(&mut self, run: Run) -> Result<()> {
        self.free_passing(run, self.pass_discard.other)
    }

    /// As [`Meta::free`]; `pass` says whether the host's space goes too.
    pub(crate) fn free_passing(&mut self, run: Run, pass: bool) -> Result<()> {
        let geometry = self.geometry();
        let (l2, freed, places) = (&mut self.l2, &mut self.freed, &mut self.places);
        let packed_end = &mut self.packed_end;
        let given = self.refcounts.sub(run, |run| {
            l2.forget_range(&(geometry.offset_of(run.first)..geometry.offset_of(run.end())));
            places.l2.remove_run(run);
            places.inactive_l2.remove_run(run);
            let has = |end| (run.first..run.end()).contains(&geometry.cluster_of(end));
            if packed_end.is_some_and(has) {
                *packed_end = None;
            }
            if pass {
                push_run(freed, run);
            }
        });
        self.noted(given)
    }

    /// As [`Meta::free`] when something has failed already: an error here only leaks.
    pub(crate) fn free_after_error(&mut self, runs: &[Run]) {
        for run in runs {
            if let Err(e) = self.free(*run) {
                tracing::warn!(image = self.storage.name(), "clusters are leaked: {e}");
            }
        }
    }

    /// Gives references back once no table on disk has them any more.
    pub(crate) fn defer_free(&mut self, run: Run) {
        push_run(&mut self.pending[usize::from(!self.pass_discard.other)], run);
    }

    /// As [`Meta::defer_free`] for what the guest said it does not need.
    pub(crate) fn defer_discard(&mut self, run: Run) {
        push_run(&mut self.pending[usize::from(!self.pass_discard.request)], run);
    }

    fn pending_runs(&self) -> usize {
        self.pending.iter().map(Vec::len).sum()
    }

    /// The L2 table an L1 entry refers to; `None` if there is none.
    pub(crate) fn l2_at(&mut self, l1_entry: u64) -> Result<Option<&mut Table>> {
        let Some(offset) = table_of(l1_entry) else {
            return Ok(None);
        };
        if self.geometry().in_cluster(offset.0) != 0 {
            return Err(self.damaged(format!("L1 entry {l1_entry:#x} is not a cluster offset")));
        }
        Ok(Some(self.l2.load(&*self.storage, offset)?))
    }

    /// A copy of the L2 table that an L1 entry refers to, for walks over all tables: these leave the
    /// cache as it is. Gives the table's place, or `None` if there is none.
    pub(crate) fn copy_l2(
        &mut self,
        l1_entry: u64,
        to: &mut Vec<u8>,
    ) -> Result<Option<HostOffset>> {
        let Some(offset) = table_of(l1_entry) else {
            return Ok(None);
        };
        if self.geometry().in_cluster(offset.0) != 0 {
            return Err(self.damaged(format!("L1 entry {l1_entry:#x} is not a cluster offset")));
        }
        to.resize(to_usize(self.geometry().cluster_size()), 0);
        match self.l2.peek(offset) {
            Some(table) => to.copy_from_slice(table.bytes()),
            None => self.storage.read_at(offset.0, &[ReadBuf::new(to)])?,
        }
        Ok(Some(offset))
    }

    /// Puts bytes of an L2 table back after [`Meta::copy_l2`]: in the cache if it is there, else on
    /// disk at once. The caller sees to it that the disk may have them.
    pub(crate) fn put_l2(
        &mut self,
        offset: HostOffset,
        bytes: &[u8],
        changed: Range<usize>,
    ) -> Result<()> {
        let run = self.cluster_run(offset);
        self.check_overlap_but(run, OverlapCheck::ACTIVE_L2 | OverlapCheck::INACTIVE_L2)?;
        if let Some(table) = self.l2.peek(offset) {
            table.bytes_mut(changed.clone()).copy_from_slice(&bytes[changed]);
            return Ok(());
        }
        let at = offset + to_u64(changed.start);
        self.storage.write_at(at.0, &[WriteBuf::new(&bytes[changed])])
    }

    /// The L2 table of an L1 index, for changes: made if there is none, copied if it is shared.
    pub(crate) fn l2_for_write(&mut self, l1_index: u64) -> Result<&mut Table> {
        let at = to_usize(l1_index);
        let entry = self.l1.get(at).copied().unwrap_or(0);
        let old = table_of(entry);
        let found = self.l2_at(entry).map(|_| ());
        self.noted(found)?;
        if entry & COPIED != 0
            && let Some(offset) = old
        {
            let run = self.cluster_run(offset);
            self.check_overlap_but(run, OverlapCheck::ACTIVE_L2 | OverlapCheck::INACTIVE_L2)?;
            return self.l2.load(&*self.storage, offset);
        }
        let mut bytes = match self.l2_at(entry)? {
            Some(table) => table.bytes().to_vec(),
            None => vec![0; to_usize(self.geometry().cluster_size())],
        };
        // The old table goes on referring to the same clusters: none is ours alone.
        for entry in bytes.chunks_exact_mut(8 * self.geometry().entry_words()) {
            entry[0] &= 0x7f;
        }
        let run = self.allocate(1, true)?;
        let new = self.geometry().offset_of(run.first);
        if let Some(old) = old {
            self.defer_free(self.cluster_run(old));
        }
        self.set_l1(at, new.0 | COPIED);
        Ok(self.l2.insert(new, bytes))
    }

    /// The one cluster at a host offset.
    pub(crate) fn cluster_run(&self, host: HostOffset) -> Run {
        Run::one(self.geometry().cluster_of(host))
    }

    /// Changes an entry of the active L1 table.
    pub(crate) fn set_l1(&mut self, index: usize, entry: u64) {
        if let Some(table) = table_of(entry) {
            self.places.l2.insert(self.geometry().cluster_of(table));
        }
        if let Some(slot) = self.l1.get_mut(index) {
            *slot = entry;
            self.l1_dirty = Some(match self.l1_dirty.take() {
                Some(old) => old.start.min(index)..old.end.max(index + 1),
                None => index..index + 1,
            });
        }
    }

    /// Replaces the active L1 table by one that is on disk already.
    pub(crate) fn replace_l1(&mut self, l1: Vec<u64>, offset: u64, size: u32) {
        for table in l1.iter().copied().filter_map(table_of) {
            self.places.l2.insert(self.geometry().cluster_of(table));
        }
        self.l1 = l1;
        self.l1_dirty = None;
        self.header.l1_offset = offset;
        self.header.l1_size = size;
    }

    /// Decodes the L2 entry of a guest offset below the L1 entry given.
    pub(crate) fn cluster_below(&mut self, l1_entry: u64, guest: u64) -> Result<Cluster> {
        let geometry = self.geometry();
        let index = geometry.l2_index(guest);
        let (entry, bitmap) = match self.l2_at(l1_entry)? {
            Some(table) => (table.entry(index), table.bitmap(index)),
            None => (0, 0),
        };
        Cluster::decode(entry, bitmap, guest, geometry).map_err(|reason| {
            self.damaged(format!("L2 entry {entry:#x} of guest offset {guest:#x}: {reason}"))
        })
    }

    /// How the active disk maps the cluster of a guest offset.
    pub(crate) fn cluster(&mut self, guest: u64) -> Result<Cluster> {
        let index = to_usize(self.geometry().l1_index(guest));
        let entry = self.l1.get(index).copied().unwrap_or(0);
        let cluster = self.cluster_below(entry, guest);
        self.noted(cluster)
    }

    /// The entry of the active L1 table.
    pub(crate) fn active_l1(&self, index: u64) -> u64 {
        self.l1.get(to_usize(index)).copied().unwrap_or(0)
    }

    /// Whether all L2 tables of a range of the active disk are in memory (or not there at all).
    pub(crate) fn tables_are_here(&self, guest: u64, len: u64) -> bool {
        let geometry = self.geometry();
        let last = guest + len.saturating_sub(1);
        (geometry.l1_index(guest)..=geometry.l1_index(last)).all(|index| {
            table_of(self.active_l1(index)).is_none_or(|offset| self.l2.contains(offset))
        })
    }
}

/// Refuses an L1 table that refers to an L2 table past the end of the file, where a truncated image
/// would read as zeroes, or to one twice: walks over all would take as long as such a table claims.
pub(super) fn check_l1(
    storage: &dyn Storage,
    geometry: Geometry,
    what: &str,
    l1: &[u64],
) -> Result<()> {
    let corrupt =
        |reason: String| Err(Error::Corrupt { filename: storage.name().to_owned(), reason });
    let len = storage.len()?;
    let mut tables: Vec<HostOffset> = l1.iter().copied().filter_map(table_of).collect();
    tables.sort_unstable();
    if let Some(last) = tables.last().filter(|last| last.0 >= len) {
        return corrupt(format!(
            "{what} refers to an L2 table at {last:#x}, beyond the end of the file ({len} bytes); is the file truncated?"
        ));
    }
    let clusters: Vec<HostCluster> = tables.iter().map(|at| geometry.cluster_of(*at)).collect();
    match clusters.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            corrupt(format!("{what} refers to the L2 table in cluster {:#x} twice", pair[1]))
        }
        None => Ok(()),
    }
}

/// Reads an L1 table whose size has been checked.
pub(super) fn read_l1(storage: &dyn Storage, offset: u64, size: u32) -> Result<Vec<u64>> {
    let mut bytes = vec![0; to_usize(size.into()) * 8];
    storage.read_at(offset, &[ReadBuf::new(&mut bytes)])?;
    Ok(bytes.chunks_exact(8).map(|entry| crate::num::be64(entry, 0)).collect())
}
