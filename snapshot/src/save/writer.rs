//! Writing guest RAM into the VM-state area of a snapshot being made.
//!
//! RAM is cut into granules of a cluster or more. The first time a page of a granule is written, the
//! whole granule is: the memory has all of it, the image would have to be read. A granule of zeroes is
//! not written and takes no space in the image; neighbours that are written go in one large request,
//! straight from guest memory, from several threads.
//!
//! The guest may run meanwhile. What it writes then is dirty, and comes again in a later round.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use block::{Progress, SnapshotCreate, WriteBuf};

use super::aside::Aside;
use crate::fault::guard::WriteGuard;
use crate::format::ram::{RAM_ALIGN, RamLayout};
use crate::memory::{Pagemap, RamSlice, page_is_zero};
use crate::parallel;
use crate::track::{PageRun, PageSet};
use crate::units::{MIB, PAGE, align_up, index};

/// Smallest granule in bytes. With smaller ones the mapping tables of images with small clusters
/// grow faster than the data shrinks.
const MIN_GRANULE: u64 = 64 << 10;

/// Largest request in bytes, and what a thread takes at a time. Host storage gains nothing beyond.
/// A multiple of the largest cluster: two threads never write to one cluster.
const CHUNK: u64 = 4 * MIB;
const CHUNK_PAGES: u64 = CHUNK / PAGE;

/// A granule that is as the base has it, or as nothing has it.
const UNTOUCHED: u8 = 0;
/// A granule of which this save has written all.
const OWN: u8 = 1;
/// A granule that reads as zeroes.
const ZERO: u8 = 2;

/// See the module. Knows what was written so far.
pub(crate) struct RamWriter<'a> {
    ram: Vec<RamSlice<'a>>,
    layout: RamLayout,
    /// In bytes, a multiple of the cluster size.
    granule: u64,
    cluster: u64,
    /// Untouched granules have the base's contents, not zeroes.
    inherited: bool,
    pagemap: Option<Pagemap>,
    /// By region and granule.
    states: Vec<Vec<AtomicU8>>,
    stored: AtomicU64,
    zero: AtomicU64,
}

impl<'a> RamWriter<'a> {
    /// A writer into an area that is empty, or with `inherited` has the base's RAM. Pages that the
    /// host never had to give are zero, unless `absent` tells that they may be elsewhere.
    pub(crate) fn new(
        ram: Vec<RamSlice<'a>>,
        layout: RamLayout,
        cluster: u64,
        inherited: bool,
        absent: bool,
    ) -> block::Result<Self> {
        if !cluster.is_power_of_two() || !(512..=RAM_ALIGN).contains(&cluster) {
            let text = format!("VM state cannot be kept in clusters of {cluster} bytes");
            return Err(block::Error::NotSupported(text));
        }
        let pagemap = if absent {
            None
        } else {
            Pagemap::open()
                .inspect_err(|error| tracing::info!(%error, "no pagemap: all of RAM is scanned"))
                .ok()
        };
        let granule = cluster.max(MIN_GRANULE);
        let states = |region: &RamSlice<'_>| {
            (0..region.len().div_ceil(granule)).map(|_| AtomicU8::new(UNTOUCHED)).collect()
        };
        Ok(Self {
            states: ram.iter().map(states).collect(),
            ram,
            layout,
            granule,
            cluster,
            inherited,
            pagemap,
            stored: AtomicU64::new(0),
            zero: AtomicU64::new(0),
        })
    }

    /// Bytes that are written at once the first time one of their pages is.
    pub(crate) fn granule(&self) -> u64 {
        self.granule
    }

    /// Where RAM lies.
    pub(crate) fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Bytes of RAM written so far, those written again counted again.
    pub(crate) fn stored(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Bytes that were found to be zero and take no space.
    pub(crate) fn zero(&self) -> u64 {
        self.zero.load(Ordering::Relaxed)
    }

    /// Writes what `pages` hold now.
    pub(crate) fn write(
        &self,
        target: &dyn SnapshotCreate,
        pages: &PageSet,
        threads: usize,
        progress: &Progress,
    ) -> block::Result<()> {
        parallel::for_each(&chunks(pages), threads, progress, |chunk| {
            self.chunk(target, pages, *chunk)?;
            progress.advance(pages.count_in(*chunk) * PAGE);
            Ok(())
        })
    }

    /// Writes pages as they were when they were set aside.
    pub(crate) fn write_aside(
        &self,
        target: &dyn SnapshotCreate,
        aside: &Aside,
        threads: usize,
        progress: &Progress,
    ) -> block::Result<()> {
        parallel::for_each(&chunks(aside.pages()), threads, progress, |chunk| {
            for (run, bytes) in aside.runs_in(*chunk) {
                target.write_vmstate(self.area_offset(run), &[WriteBuf::new(bytes)])?;
                self.stored.fetch_add(run.len(), Ordering::Relaxed);
                progress.advance(run.len());
            }
            Ok(())
        })
    }

    /// Writes pages that were kept as they were at the switch, until there are no more.
    pub(crate) fn write_kept(
        &self,
        target: &dyn SnapshotCreate,
        guard: &WriteGuard,
        progress: &Progress,
    ) -> block::Result<()> {
        while let Some(kept) = guard.take().map_err(host_failed)? {
            progress.check()?;
            let bytes = kept.copies.bytes();
            target.write_vmstate(self.area_offset(kept.run), &[WriteBuf::new(bytes)])?;
            self.stored.fetch_add(kept.run.len(), Ordering::Relaxed);
            progress.advance(kept.run.len());
        }
        Ok(())
    }

    fn chunk(
        &self,
        target: &dyn SnapshotCreate,
        pages: &PageSet,
        chunk: PageRun,
    ) -> block::Result<()> {
        let mut output = Output { writer: self, target, region: chunk.region, run: None };
        let mut touched = None;
        for granule in chunk.pieces(self.granule / PAGE) {
            if !pages.contains_any(granule) {
                continue;
            }
            let touched = touched.get_or_insert_with(|| self.touched(chunk));
            let looked_at = |page: u64| {
                touched.as_ref().is_none_or(|touched| touched[index(page - chunk.first)])
            };
            let state = &self.states[granule.region][index(granule.offset() / self.granule)];
            let before = state.load(Ordering::Relaxed);
            if self.is_zero(granule, looked_at) {
                self.zero.fetch_add(granule.len(), Ordering::Relaxed);
                let is_zero = before == ZERO || before == UNTOUCHED && !self.inherited;
                if !is_zero {
                    output.flush()?;
                    // With what is behind the end of the region.
                    let len = align_up(granule.len(), self.cluster).unwrap_or(granule.len());
                    target.zero_vmstate(self.area_offset(granule), len)?;
                }
                state.store(ZERO, Ordering::Relaxed);
            } else if before == UNTOUCHED {
                output.add(granule)?;
                state.store(OWN, Ordering::Relaxed);
            } else {
                for run in pages.runs_in(granule) {
                    output.add(run)?;
                }
            }
        }
        output.flush()
    }

    fn area_offset(&self, run: PageRun) -> u64 {
        self.layout.regions()[run.region].offset.0 + run.offset()
    }

    /// Which pages of the chunk may be other than zero; `None` if any may.
    fn touched(&self, chunk: PageRun) -> Option<Vec<bool>> {
        let region = &self.ram[chunk.region];
        let pagemap = self.pagemap.as_ref().filter(|_| region.is_anonymous())?;
        pagemap.touched(region.host(chunk.offset(), chunk.len()), chunk.count).ok()
    }

    /// Whether all pages are zero; of which only those `looked_at` can be other.
    fn is_zero(&self, granule: PageRun, looked_at: impl Fn(u64) -> bool) -> bool {
        let region = &self.ram[granule.region];
        (granule.first..granule.end()).filter(|page| looked_at(*page)).all(|page| {
            // SAFETY: `host` checked that the page is inside the mapped region; regions are made of
            // whole pages.
            unsafe { page_is_zero(region.host(page * PAGE, PAGE)) }
        })
    }
}

/// Gathers runs that follow each other into one request.
struct Output<'w, 'a> {
    writer: &'w RamWriter<'a>,
    target: &'w dyn SnapshotCreate,
    region: usize,
    /// First page and the one after the last.
    run: Option<(u64, u64)>,
}

impl Output<'_, '_> {
    fn add(&mut self, run: PageRun) -> block::Result<()> {
        match &mut self.run {
            Some((_, end)) if *end == run.first => *end = run.end(),
            _ => {
                self.flush()?;
                self.run = Some((run.first, run.end()));
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> block::Result<()> {
        let Some((first, end)) = self.run.take() else { return Ok(()) };
        let run = PageRun { region: self.region, first, count: end - first };
        let buf = self.writer.ram[self.region].write_buf(run.offset(), run.len());
        self.target.write_vmstate(self.writer.area_offset(run), &[buf])?;
        self.writer.stored.fetch_add(run.len(), Ordering::Relaxed);
        Ok(())
    }
}

fn host_failed(source: std::io::Error) -> block::Error {
    let filename = "guest RAM".to_owned();
    block::Error::Io { operation: "keeping", filename, offset: 0, source }
}

/// The chunks in which `pages` has a page.
fn chunks(pages: &PageSet) -> Vec<PageRun> {
    pages.in_groups(CHUNK_PAGES).runs().flat_map(|run| run.pieces(CHUNK_PAGES)).collect()
}
