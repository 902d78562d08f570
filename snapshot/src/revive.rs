//! Filling guest RAM from the VM-state area of a snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

use block::Progress;
use block::snapshot::VmStateRead;

use crate::format::ram::{RamLayout, RamRegion};
use crate::memory::RamSlice;
use crate::parallel;
use crate::units::{MIB, index};

/// Largest read in bytes.
const CHUNK: u64 = 4 * MIB;

/// How much of the area is asked for its mapping at a time, in bytes. Bounds what an image with tiny
/// clusters can make us allocate for a moment.
const MAP_WINDOW: u64 = 64 * MIB;

/// Parts with a shorter gap between them are one: the gap reads as zeroes. No writer of ours leaves
/// such gaps, and an image that has them in quantity cannot make us keep a long list.
const LEAST_GAP: u64 = 64 << 10;

/// What became of the RAM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReviveReport {
    /// Read from the image.
    pub read: u64,
    /// Not stored in the image: zero.
    pub zero: u64,
}

/// A part of a RAM region that the image stores: region index, offset in the region, length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stored(pub(crate) usize, pub(crate) u64, pub(crate) u64);

enum Item {
    Read(Stored),
    Clear(Stored),
}

/// Finds what the image stores of each RAM region by walking its mapping, so that a damaged one is
/// seen before anything depends on it. The regions must be those of this machine: the time this
/// takes, and the length of the list, follow their size.
pub(crate) fn stored_parts(
    vmstate: &dyn VmStateRead,
    layout: &RamLayout,
) -> block::Result<Vec<Stored>> {
    let mut parts = Vec::new();
    for (at, region) in layout.regions().iter().enumerate() {
        for start in (0..region.len).step_by(index(MAP_WINDOW)) {
            let len = MAP_WINDOW.min(region.len - start);
            stored_in(vmstate, at, region, start, len, &mut parts)?;
        }
    }
    Ok(parts)
}

fn stored_in(
    vmstate: &dyn VmStateRead,
    at: usize,
    region: &RamRegion,
    start: u64,
    len: u64,
    parts: &mut Vec<Stored>,
) -> block::Result<()> {
    let window = region.offset.0 + start;
    for extent in vmstate.extents(window, len)? {
        let from = extent.offset.max(window);
        let to = (extent.offset.saturating_add(extent.len)).min(window + len);
        if extent.zero || from >= to {
            continue;
        }
        let (start, end) = (from - region.offset.0, to - region.offset.0);
        match parts.last_mut() {
            Some(Stored(last, offset, len))
                if *last == at && start - (*offset + *len) < LEAST_GAP =>
            {
                *len = end - *offset;
            }
            _ => parts.push(Stored(at, start, end - start)),
        }
    }
    Ok(())
}

/// Makes `ram` what the snapshot holds. `fresh` memory was never written and needs no clearing.
pub(crate) fn revive(
    vmstate: &dyn VmStateRead,
    parts: &[Stored],
    layout: &RamLayout,
    ram: &[RamSlice<'_>],
    fresh: bool,
    threads: usize,
    progress: &Progress,
) -> block::Result<ReviveReport> {
    let read = AtomicU64::new(0);
    let items = items(parts, layout, fresh);
    parallel::for_each(&items, threads, progress, |item| {
        let len = match *item {
            Item::Read(Stored(at, offset, len)) => {
                let from = layout.regions()[at].offset.0 + offset;
                vmstate.read(from, &[ram[at].read_buf(offset, len)])?;
                read.fetch_add(len, Ordering::Relaxed);
                len
            }
            Item::Clear(Stored(at, offset, len)) => {
                ram[at].clear(offset, len);
                len
            }
        };
        progress.advance(len);
        Ok(())
    })?;
    let read = read.into_inner();
    let zero = layout.ram_bytes() - read;
    if fresh {
        progress.advance(zero);
    }
    Ok(ReviveReport { read, zero })
}

/// Cuts all of RAM into reads and, unless it is fresh, the gaps between them into clears.
fn items(parts: &[Stored], layout: &RamLayout, fresh: bool) -> Vec<Item> {
    let mut items = Vec::new();
    let mut parts = parts.iter().copied().peekable();
    for (at, region) in layout.regions().iter().enumerate() {
        let mut done = 0;
        while let Some(part) = parts.next_if(|part| part.0 == at) {
            if !fresh {
                cut(Stored(at, done, part.1 - done), Item::Clear, &mut items);
            }
            cut(part, Item::Read, &mut items);
            done = part.1 + part.2;
        }
        if !fresh {
            cut(Stored(at, done, region.len - done), Item::Clear, &mut items);
        }
    }
    items
}

fn cut(Stored(at, offset, len): Stored, kind: fn(Stored) -> Item, items: &mut Vec<Item>) {
    let mut done = 0;
    while done < len {
        // To the next multiple of a chunk, so that requests stay aligned to clusters.
        let step = CHUNK - (offset + done) % CHUNK;
        let step = step.min(len - done);
        items.push(kind(Stored(at, offset + done, step)));
        done += step;
    }
}
