//! RAM that is mapped from the image instead of read.

use block::Progress;
use block::snapshot::VmStateRead;
use vm_memory::GuestAddress;

use crate::GuestMemory;
use crate::format::ram::RamLayout;
use crate::load::{Checkpoint, LoadError};
use crate::memory;
use crate::revive::{Stored, revive};
use crate::units::PAGE;

/// Smallest piece that is mapped, in bytes: a mapping costs the host more than the memory of less.
const MIN_PIECE: u64 = 64 << 10;

/// Most pieces that are mapped: a quarter of the mappings that Linux lets a process have.
const MAX_PIECES: usize = 16384;

/// What became of the RAM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MapReport {
    /// Mapped from the image.
    pub mapped: u64,
    /// Read from the image.
    pub read: u64,
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
    /// Fills fresh RAM: pieces that `map` maps, and says so, and the rest by reading.
    ///
    /// # Errors
    /// As [`Checkpoint::read_ram`].
    pub fn map_ram(
        &self,
        ram: &GuestMemory,
        threads: usize,
        progress: &Progress,
        mut map: impl FnMut(Piece) -> bool,
    ) -> Result<MapReport, LoadError> {
        let stored = self.stored(ram)?;
        let failed = |source| self.unread(source);
        let vmstate = self.open_vmstate().map_err(failed)?;
        let mut rest = Vec::new();
        let mut report = MapReport::default();
        let mut pieces = 0;
        for &stored in stored {
            for (part, piece) in split(&*vmstate, self.layout(), stored).map_err(failed)? {
                match piece {
                    Some(piece) if pieces < MAX_PIECES && map(piece) => {
                        pieces += 1;
                        report.mapped += piece.len;
                    }
                    _ => rest.push(part),
                }
            }
        }
        let ram = memory::slices(ram);
        let revived = revive(&*vmstate, &rest, self.layout(), &ram, true, threads, progress);
        report.read = revived.map_err(failed)?.read;
        Ok(report)
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
        let aligned = [from, place.host].iter().all(|n| n.is_multiple_of(PAGE));
        let whole = place.len - place.len % PAGE;
        if !aligned || whole < MIN_PIECE {
            continue;
        }
        if done < from {
            out.push((Stored(at, done, from - done), None));
        }
        let piece =
            Piece { guest: GuestAddress(region.start.0 + from), len: whole, host: place.host };
        out.push((Stored(at, from, whole), Some(piece)));
        done = from + whole;
    }
    if done < start + len {
        out.push((Stored(at, done, start + len - done), None));
    }
    Ok(out)
}
