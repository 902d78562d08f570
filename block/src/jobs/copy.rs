//! Copying pieces from one node to another: zeroes as zeroes, data as data.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::Side;
use crate::num::to_usize;
use crate::queue::AlignedBuf;
use crate::{Error, Format, Node, ReadBuf, Result, StatusExtent, WriteBuf};

/// Bytes that are read and written at once, unless a chunk is larger.
pub(super) const PIECE: u64 = 1 << 20;
/// Bytes whose status is asked for at once.
pub(super) const LOOK: u64 = 64 << 20;
/// Buffers that are kept for the next piece.
const MAX_SPARE: usize = 8;

/// What is done with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is read and written.
    Data,
    /// It reads as zeroes, and is made to.
    Zero,
    /// The target is to have nothing of it.
    Skip,
}

/// Why a piece could not be copied.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) side: Side,
    pub(super) error: Error,
}

fn at(side: Side) -> impl FnOnce(Error) -> Failed {
    move |error| Failed { side, error }
}

/// How requests reach the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Through their gates.
    Through,
    /// Past the gates, for who holds them.
    Held,
}

/// From where to where, and how.
#[derive(Debug)]
pub(super) struct Copier {
    pub(super) source: Arc<Node>,
    pub(super) target: Arc<Node>,
    /// Only what the source's own image has is copied.
    pub(super) top_only: bool,
    /// The target is to be whole without anything below it.
    pub(super) whole: bool,
    pub(super) compress: bool,
    /// Zeroes may give the target's space back.
    pub(super) unmap: bool,
    /// Bytes that are read and written at once: whole chunks.
    pub(super) piece: u64,
    pub(super) spare: Mutex<Vec<AlignedBuf>>,
}

impl Copier {
    /// What is to be done from the start of a range on, which is made of chunks of `unit` bytes, and up
    /// to where.
    pub(super) fn look(
        &self,
        range: &Range<u64>,
        unit: u64,
        way: Way,
    ) -> std::result::Result<(Range<u64>, Kind), Failed> {
        let ask = |format: &dyn Format| format.block_status(range.start, range.end - range.start);
        let list = match way {
            Way::Through => ask(self.source.access().format()),
            Way::Held => ask(&*self.source.format()),
        };
        let list = list.map_err(at(Side::Source))?;
        Ok(first_of_kind(range, unit, &list, |extent| self.kind(extent)))
    }

    fn kind(&self, extent: &StatusExtent) -> Kind {
        match extent {
            extent if self.top_only && extent.depth != 1 => Kind::Skip,
            extent if extent.zero => Kind::Zero,
            _ => Kind::Data,
        }
    }

    /// Copies a range that is all of one kind; data at most `piece` bytes at once.
    pub(super) fn copy(
        &self,
        range: &Range<u64>,
        kind: Kind,
        way: Way,
    ) -> std::result::Result<(), Failed> {
        match kind {
            Kind::Skip => Ok(()),
            Kind::Zero => self.zero(range, way).map_err(at(Side::Target)),
            Kind::Data => {
                let mut start = range.start;
                while start < range.end {
                    let end = range.end.min(start + self.piece);
                    self.copy_data(start..end, way)?;
                    start = end;
                }
                Ok(())
            }
        }
    }

    fn copy_data(&self, range: Range<u64>, way: Way) -> std::result::Result<(), Failed> {
        let len = to_usize(range.end - range.start);
        let mut buf = self.buf();
        let bytes = buf.get_mut(..len).unwrap_or_default();
        let read = match way {
            Way::Through => self.source.read(range.start, &[ReadBuf::new(bytes)]),
            Way::Held => self.source.format().read(range.start, &[ReadBuf::new(bytes)]),
        };
        read.map_err(at(Side::Source))?;
        let bufs = [WriteBuf::new(bytes)];
        let written = match (way, self.compress) {
            (Way::Through, false) => self.target.write(range.start, &bufs),
            (Way::Through, true) => self.target.write_compressed(range.start, &bufs),
            (Way::Held, _) => {
                let result = self.target.format().write(range.start, &bufs);
                self.target.note_write(range.start, range.end - range.start);
                result
            }
        };
        self.give_buf(buf);
        written.map_err(at(Side::Target))
    }

    /// Has zeroes be the target's own from now on, if it gets a part of a disk; says whether it does.
    pub(super) fn records_zeroes(&self) -> bool {
        let image = self.target.qcow2().filter(|_| !self.whole);
        if let Some(image) = &image {
            image.record_zeroes();
        }
        image.is_some()
    }

    /// Whether the rest of a chunk has to come with any part of it: the target has nothing to take the
    /// rest from, and would hide what is below it later.
    pub(super) fn takes_whole_chunks(&self) -> bool {
        !self.whole && self.target.qcow2().is_some() && self.target.backing().is_none()
    }

    /// Makes a range of the target read as zeroes, where it does not: saying so again could take
    /// space for tables.
    fn zero(&self, range: &Range<u64>, way: Way) -> Result<()> {
        // What is not below it now may be later: under a part of a disk always, else where the image
        // names it.
        let alone = !self.records_zeroes() && self.target.recorded_backing().is_none();
        let mut start = range.start;
        while start < range.end {
            let ask = |format: &dyn Format| format.block_status(start, range.end - start);
            let list = match way {
                Way::Through => ask(self.target.access().format()),
                Way::Held => ask(&*self.target.format()),
            }?;
            let before = start;
            for extent in list {
                let len = extent.len.min(range.end - start);
                // What the target only reads as zeroes from below it is its own afterwards.
                let own = extent.depth == 1 || (extent.depth == 0 && alone);
                if !(extent.zero && own) && len > 0 {
                    self.write_zeroes(start, len, way)?;
                }
                start += len;
            }
            if start == before {
                return self.write_zeroes(start, range.end - start, way);
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, way: Way) -> Result<()> {
        match way {
            Way::Through => self.target.write_zeroes(offset, len, self.unmap),
            Way::Held => {
                let result = self.target.format().write_zeroes(offset, len, self.unmap);
                self.target.note_write(offset, len);
                result
            }
        }
    }

    fn buf(&self) -> AlignedBuf {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| AlignedBuf::new(to_usize(self.piece)))
    }

    fn give_buf(&self, buf: AlignedBuf) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE {
            spare.push(buf);
        }
    }
}

/// The first part of a range of whole chunks that is to be treated in one way. A chunk of which any
/// part is data is data; of which any part is not to be skipped, is not skipped.
fn first_of_kind(
    range: &Range<u64>,
    unit: u64,
    list: &[StatusExtent],
    kind: impl Fn(&StatusExtent) -> Kind,
) -> (Range<u64>, Kind) {
    let mut end = range.start;
    // Joined, as neighbours may differ in what is not looked at.
    let mut extents = Vec::new();
    for extent in list {
        end = range.end.min(end.saturating_add(extent.len));
        extents.push((end, kind(extent)));
    }
    let Some(&(_, first)) = extents.first() else {
        return (range.clone(), Kind::Data);
    };
    let same = extents.iter().take_while(|(_, kind)| *kind == first).last();
    let same_to = same.map_or(range.start, |(end, _)| *end);
    // Chunk borders, or the range's end, which is one.
    let whole = if same_to == range.end { same_to } else { same_to - same_to % unit };
    if whole > range.start && first != Kind::Data {
        return (range.start..whole, first);
    }
    if first == Kind::Data {
        let end = same_to.next_multiple_of(unit).min(range.end);
        return (range.start..end, Kind::Data);
    }
    // A chunk of several kinds.
    let chunk = range.end.min(range.start + unit - range.start % unit);
    let kinds = |wanted: Kind| {
        let mut from = range.start;
        extents.iter().any(|(end, kind)| {
            let within = from < chunk && *kind == wanted;
            from = *end;
            within
        })
    };
    let known = extents.last().is_some_and(|(end, _)| *end >= chunk);
    let kind = match () {
        () if !known || kinds(Kind::Data) => Kind::Data,
        // Zeroes of its own beside what is not: the chunk is copied as it reads.
        () if kinds(Kind::Skip) => Kind::Data,
        () => first,
    };
    (range.start..chunk, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(range: Range<u64>, list: &[StatusExtent]) -> (Range<u64>, Kind) {
        first_of_kind(&range, 100, list, |extent| match extent {
            extent if extent.depth != 1 => Kind::Skip,
            extent if extent.zero => Kind::Zero,
            _ => Kind::Data,
        })
    }

    #[test]
    fn a_look_gives_the_first_part_of_whole_chunks_of_one_kind() {
        let (data, zero) = (StatusExtent::data, StatusExtent::zero);
        let none = StatusExtent::unallocated;
        assert_eq!(first(0..1000, &[zero(250), data(50)]), (0..200, Kind::Zero));
        assert_eq!(first(200..1000, &[zero(50), data(50)]), (200..300, Kind::Data));
        assert_eq!(first(200..1000, &[data(50), zero(50)]), (200..300, Kind::Data));
        assert_eq!(first(200..1000, &[data(150), data(60)]), (200..500, Kind::Data));
        assert_eq!(first(200..1000, &[none(50), zero(50)]), (200..300, Kind::Data));
        assert_eq!(first(200..1000, &[none(150), zero(50)]), (200..300, Kind::Skip));
        // A list that ends early, and a range that ends with the disk.
        assert_eq!(first(200..1000, &[zero(50)]), (200..300, Kind::Data));
        assert_eq!(first(200..250, &[zero(50)]), (200..250, Kind::Zero));
        assert_eq!(first(200..250, &[zero(20), data(30)]), (200..250, Kind::Data));
        assert_eq!(first(200..250, &[]), (200..250, Kind::Data));
    }
}
