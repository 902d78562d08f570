//! Writing guest RAM into the VM-state area of a snapshot being made.
//!
//! RAM is cut into granules of a cluster or more. A granule of zeroes is not written and takes no
//! space in the image; neighbours that are written go in one large request, straight from guest
//! memory, from several threads.

use std::sync::atomic::{AtomicU64, Ordering};

use block::{Progress, SnapshotCreate, WriteBuf};

use crate::format::ram::{RAM_ALIGN, RamLayout};
use crate::memory::{Pagemap, RamSlice, page_is_zero};
use crate::parallel;
use crate::units::{MIB, PAGE, align_up, index};

/// Smallest granule in bytes. With smaller ones the mapping tables of images with small clusters
/// grow faster than the data shrinks.
const MIN_GRANULE: u64 = 64 << 10;

/// Largest request in bytes, and what a thread takes at a time. Host storage gains nothing beyond.
const CHUNK: u64 = 4 * MIB;

/// What became of the RAM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Captured {
    /// Written to the image.
    pub(crate) stored: u64,
    /// Not written because it is zero.
    pub(crate) zero: u64,
}

/// A part of one region: region index, offset in it, length.
struct Chunk(usize, u64, u64);

struct Capture<'a> {
    target: &'a dyn SnapshotCreate,
    ram: &'a [RamSlice<'a>],
    layout: &'a RamLayout,
    /// A multiple of the cluster size.
    granule: u64,
    pagemap: Option<Pagemap>,
    /// What fills the last cluster of a region.
    padding: &'a [u8],
    stored: AtomicU64,
}

/// Writes all of `ram` where `layout` says. Guest memory must not change meanwhile, or what is
/// stored is of no one moment.
pub(crate) fn capture(
    target: &dyn SnapshotCreate,
    ram: &[RamSlice<'_>],
    layout: &RamLayout,
    threads: usize,
    progress: &Progress,
) -> block::Result<Captured> {
    let cluster = target.cluster_size();
    if !cluster.is_power_of_two() || !(512..=RAM_ALIGN).contains(&cluster) {
        let text = format!("VM state cannot be kept in clusters of {cluster} bytes");
        return Err(block::Error::NotSupported(text));
    }
    let pagemap = Pagemap::open()
        .inspect_err(|error| tracing::info!(%error, "no pagemap: all of RAM is scanned"))
        .ok();
    let padding = vec![0; index(cluster)];
    let capture = Capture {
        target,
        ram,
        layout,
        granule: cluster.max(MIN_GRANULE),
        pagemap,
        padding: &padding,
        stored: AtomicU64::new(0),
    };
    parallel::for_each(&chunks(ram), threads, progress, |chunk| {
        capture.chunk(chunk)?;
        progress.advance(chunk.2);
        Ok(())
    })?;
    let stored = capture.stored.into_inner();
    Ok(Captured { stored, zero: layout.ram_bytes() - stored })
}

fn chunks(ram: &[RamSlice<'_>]) -> Vec<Chunk> {
    let of_region = |(at, region): (usize, &RamSlice<'_>)| {
        let len = region.len();
        let starts = (0..len).step_by(index(CHUNK));
        starts.map(|start| Chunk(at, start, CHUNK.min(len - start))).collect::<Vec<_>>()
    };
    ram.iter().enumerate().flat_map(of_region).collect()
}

impl Capture<'_> {
    fn chunk(&self, &Chunk(at, start, len): &Chunk) -> block::Result<()> {
        let region = &self.ram[at];
        let touched = self.touched(region, start, len);
        let mut run: Option<(u64, u64)> = None;
        for granule in (start..start + len).step_by(index(self.granule)) {
            let end = (granule + self.granule).min(start + len);
            if has_data(region, &touched, start, granule, end) {
                run = Some((run.map_or(granule, |(first, _)| first), end));
            } else if let Some((first, end)) = run.take() {
                self.write(at, first, end)?;
            }
        }
        match run {
            Some((first, end)) => self.write(at, first, end),
            None => Ok(()),
        }
    }

    /// Which pages of the chunk may be other than zero; `None` if any may.
    fn touched(&self, region: &RamSlice<'_>, start: u64, len: u64) -> Option<Vec<bool>> {
        let pagemap = self.pagemap.as_ref().filter(|_| region.is_anonymous())?;
        pagemap.touched(region.host(start, len), len / PAGE).ok()
    }

    /// Writes a range of one region that starts at a granule; only the region's last range may end
    /// inside a cluster, and is filled up.
    fn write(&self, at: usize, start: u64, end: u64) -> block::Result<()> {
        let len = end - start;
        let offset = self.layout.regions()[at].offset.0 + start;
        let whole = align_up(len, self.padding.len() as u64).unwrap_or(len);
        let bufs = [
            self.ram[at].write_buf(start, len),
            WriteBuf::new(&self.padding[..index(whole - len)]),
        ];
        let used = if whole == len { &bufs[..1] } else { &bufs[..] };
        self.target.write_vmstate(offset, used)?;
        self.stored.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether any page from `from` to `to` is not zero. `touched` counts pages from `start`.
fn has_data(
    region: &RamSlice<'_>,
    touched: &Option<Vec<bool>>,
    start: u64,
    from: u64,
    to: u64,
) -> bool {
    (from..to).step_by(index(PAGE)).any(|page| {
        let untouched = |touched: &Vec<bool>| !touched[index((page - start) / PAGE)];
        if touched.as_ref().is_some_and(untouched) {
            return false;
        }
        // SAFETY: `host` checked that the page is inside the mapped region; regions and steps are
        // made of whole pages.
        unsafe { !page_is_zero(region.host(page, PAGE)) }
    })
}
