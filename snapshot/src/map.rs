//! RAM that is mapped from the image instead of read.
//!
//! What cannot be mapped is read, at once or when it is touched. The latter is done by whole units, so pieces are cut
//! to whole units too.

use std::sync::Arc;

use block::Progress;
use block::snapshot::VmStateRead;
use vm_memory::GuestAddress;

use crate::GuestMemory;
use crate::fault::{LazyHost, LazyRam, Notify, Orders, UNIT, Units};
use crate::format::ram::RamLayout;
use crate::load::{Checkpoint, LoadError};
use crate::memory;
use crate::revive::{ReviveReport, Stored, revive};
use crate::units::PAGE;

/// Smallest piece that is mapped, in bytes: a mapping costs the host more than the memory of less.
const MIN_PIECE: u64 = UNIT;

/// Most pieces that are mapped. Linux lets a process have 65530 mappings: one for each, and where all that lies
/// between them is watched in part, three for each gap, and as many as [`Units`] adds.
const MAX_PIECES: usize = 8192;

/// RAM of a checkpoint of which a part is mapped.
#[derive(Debug)]
pub struct MappedRam {
    pieces: Vec<Stored>,
    /// What is stored besides.
    rest: Vec<Stored>,
}

impl MappedRam {
    /// Bytes that are mapped.
    pub fn mapped_bytes(&self) -> u64 {
        bytes(&self.pieces)
    }

    /// Bytes that are stored and not mapped.
    pub fn rest_bytes(&self) -> u64 {
        bytes(&self.rest)
    }
}

fn bytes(parts: &[Stored]) -> u64 {
    parts.iter().map(|Stored(_, _, len)| len).sum()
}

/// A piece of RAM and where the image's file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Guest physical address, a multiple of a page.
    pub guest: GuestAddress,
    /// Length in bytes, a multiple of a page.
    pub len: u64,
    /// Offset in the file in bytes, a multiple of a page.
    pub host: u64,
}

impl Checkpoint {
    /// Looks for pieces of fresh RAM that can be mapped; those are that `map` maps, and says so. The rest is for
    /// [`Checkpoint::read_rest`] or [`Checkpoint::lend_rest`].
    ///
    /// # Errors
    /// As [`Checkpoint::read_ram`].
    pub fn map_ram(
        &self,
        ram: &GuestMemory,
        mut map: impl FnMut(Piece) -> bool,
    ) -> Result<MappedRam, LoadError> {
        let stored = self.stored(ram)?;
        let failed = |source| self.unread(source);
        let vmstate = self.open_vmstate().map_err(failed)?;
        let mut mapped = MappedRam { pieces: Vec::new(), rest: Vec::new() };
        for &stored in stored {
            for (part, piece) in split(&*vmstate, self.layout(), stored).map_err(failed)? {
                match piece {
                    Some(piece) if mapped.pieces.len() < MAX_PIECES && map(piece) => {
                        mapped.pieces.push(part);
                    }
                    _ => mapped.rest.push(part),
                }
            }
        }
        Ok(mapped)
    }

    /// Reads what is not mapped.
    ///
    /// # Errors
    /// As [`Checkpoint::read_ram`].
    pub fn read_rest(
        &self,
        mapped: &MappedRam,
        ram: &GuestMemory,
        threads: usize,
    ) -> Result<ReviveReport, LoadError> {
        let failed = |source| self.unread(source);
        let vmstate = self.open_vmstate().map_err(failed)?;
        let (ram, progress) = (memory::slices(ram), Progress::default());
        revive(&*vmstate, &mapped.rest, self.layout(), &ram, true, threads, &progress)
            .map_err(failed)
    }

    /// Has what is not mapped read when it is needed, as [`Checkpoint::lend_ram`] does with all of RAM.
    ///
    /// # Errors
    /// As [`Checkpoint::lend_ram`].
    pub fn lend_rest(
        &self,
        mapped: &MappedRam,
        host: LazyHost,
        ram: &GuestMemory,
        orders: &Arc<Orders>,
        notify: Notify,
    ) -> Result<LazyRam, LoadError> {
        let units = Units::new(ram, self.layout(), &mapped.rest).beside(&mapped.pieces);
        LazyRam::start(host, self.source(orders), units, ram, true, notify)
            .map_err(|source| self.unread(source))
    }
}

/// Cuts a stored part into pieces that can be mapped and such that cannot.
fn split(
    vmstate: &dyn VmStateRead,
    layout: &RamLayout,
    Stored(at, start, len): Stored,
) -> block::Result<Vec<(Stored, Option<Piece>)>> {
    let region = &layout.regions()[at];
    let mut out = Vec::new();
    let mut done = start;
    for place in vmstate.places(region.offset.0 + start, len)? {
        let from = place.offset - region.offset.0;
        let Some((first, end)) = whole_units(from, place.len, region.len) else { continue };
        let host = place.host + (first - from);
        if !host.is_multiple_of(PAGE) {
            continue;
        }
        if done < first {
            out.push((Stored(at, done, first - done), None));
        }
        let piece = Piece { guest: GuestAddress(region.start.0 + first), len: end - first, host };
        out.push((Stored(at, first, end - first), Some(piece)));
        done = end;
    }
    if done < start + len {
        out.push((Stored(at, done, start + len - done), None));
    }
    Ok(out)
}

/// The whole units in a part of a region, from and to, where they are worth a mapping. The last unit of a region may
/// be shorter than others.
fn whole_units(from: u64, len: u64, region: u64) -> Option<(u64, u64)> {
    let first = from.checked_next_multiple_of(UNIT)?;
    let end = from + len;
    let end = if end == region { end } else { end - end % UNIT };
    (end >= first.checked_add(MIN_PIECE)?).then_some((first, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_cut_to_whole_units_and_may_end_with_the_region() {
        let region = 20 * UNIT + PAGE;
        assert_eq!(whole_units(2 * UNIT, 3 * UNIT, region), Some((2 * UNIT, 5 * UNIT)));
        assert_eq!(whole_units(UNIT + 512, 3 * UNIT, region), Some((2 * UNIT, 4 * UNIT)));
        assert_eq!(whole_units(UNIT + 512, 2 * UNIT - 513, region), None);
        let to_the_end = region - 18 * UNIT;
        assert_eq!(whole_units(18 * UNIT, to_the_end, region), Some((18 * UNIT, region)));
        assert_eq!(whole_units(20 * UNIT, PAGE, region), None);
    }
}
