//! Which parts of guest RAM are missing.
//!
//! RAM is cut into *units* of 64 KiB, the smallest that is worth a read. Each has a state:
//!
//! ```text
//!            claim              filled
//!   Stored ────────> Reading ──────────> Present
//!     ^                 │                   ^
//!     └─────────────────┘                   │ a fault
//!        the read fails      Zero ──────────┘
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::GuestMemory;

use crate::format::ram::RamLayout;
use crate::memory;
use crate::revive::Stored;
use crate::units::{MIB, index};

/// Bytes of a unit.
pub(crate) const UNIT: u64 = 64 << 10;

/// Units are claimed together if they are of one part of memory of this size, which may be a huge page
/// of the host.
pub(super) const BLOCK: u64 = 2 * MIB;

/// Stretches of RAM that the image does not store are left alone if they are longer than this: the
/// host gives zeroes, and huge pages, by itself. Each stretch costs a mapping.
const LEAST_GAP: u64 = 2 * MIB;
/// Mappings that the stretches may cost; a process has 65530 by default.
const MOST_RANGES: u64 = 8192;

const PRESENT: u8 = 0;
/// Not stored in the image.
const ZERO: u8 = 1;
const STORED: u8 = 2;
/// Someone reads it.
const READING: u8 = 3;
/// There by other means, in memory that cannot be watched.
const MAPPED: u8 = 4;

/// A contiguous piece of RAM.
struct Region {
    /// Host address.
    host: usize,
    len: u64,
    /// Offset in the VM-state area.
    offset: u64,
    /// Its first unit.
    first: usize,
}

/// Consecutive units of one region, as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first unit.
    pub(super) unit: usize,
    /// How many.
    pub(super) count: usize,
    /// Host address.
    pub(super) host: usize,
    /// Offset in the VM-state area.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u64,
}

/// What a fault finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It was missing; the caller reads it now.
    Read,
    /// It was missing and is zero.
    Zero,
    /// Someone else reads it.
    Busy,
    /// It is there.
    Present,
}

/// The state of every unit.
pub(crate) struct Units {
    regions: Vec<Region>,
    states: Vec<AtomicU8>,
    /// Units that are stored and not yet there.
    left: AtomicUsize,
}

impl Units {
    /// All that is `stored` of RAM is missing.
    pub(crate) fn new(ram: &GuestMemory, layout: &RamLayout, stored: &[Stored]) -> Self {
        let mut regions = Vec::new();
        let mut first = 0;
        for (slice, region) in memory::slices(ram).iter().zip(layout.regions()) {
            let (host, len) = (slice.host(0, slice.len()).addr(), slice.len());
            regions.push(Region { host, len, offset: region.offset.0, first });
            first += index(len.div_ceil(UNIT));
        }
        let mut units = Self {
            regions,
            states: (0..first).map(|_| AtomicU8::new(PRESENT)).collect(),
            left: AtomicUsize::new(0),
        };
        let marked = units.mark(stored, STORED);
        units.left = AtomicUsize::new(marked);
        units
    }

    /// Leaves parts alone that are there, in memory that cannot be watched: whole units of which nothing is stored.
    pub(crate) fn beside(mut self, mapped: &[Stored]) -> Self {
        self.mark(mapped, MAPPED);
        self
    }

    /// Gives how many units have that state for the first time.
    fn mark(&mut self, parts: &[Stored], to: u8) -> usize {
        let mut marked = 0;
        for &Stored(region, offset, len) in parts {
            let first = self.regions[region].first;
            let units = index(offset / UNIT)..index((offset + len).div_ceil(UNIT));
            for state in &mut self.states[first + units.start..first + units.end] {
                let state = state.get_mut();
                marked += usize::from(*state != to);
                *state = to;
            }
        }
        marked
    }

    /// The parts of RAM to be watched, as host address and length. Units in between that are not
    /// stored are marked as zero; all others are present.
    pub(super) fn ranges(&mut self) -> Vec<(usize, u64)> {
        let total: u64 = self.regions.iter().map(|region| region.len).sum();
        let gap = index(LEAST_GAP.max(total / MOST_RANGES) / UNIT);
        let mut ranges = Vec::new();
        for region in &self.regions {
            let count = index(region.len.div_ceil(UNIT));
            let states = &mut self.states[region.first..region.first + count];
            for units in stretches(states, gap) {
                for state in &mut states[units.clone()] {
                    if *state.get_mut() == PRESENT {
                        *state.get_mut() = ZERO;
                    }
                }
                let start = units.start as u64 * UNIT;
                let end = (units.end as u64 * UNIT).min(region.len);
                ranges.push((region.host + index(start), end - start));
            }
            for state in states {
                if *state.get_mut() == MAPPED {
                    *state.get_mut() = PRESENT;
                }
            }
        }
        ranges
    }

    /// The unit that holds a host address.
    pub(super) fn at(&self, host: usize) -> Option<usize> {
        self.regions.iter().find_map(|region| {
            let offset = host.checked_sub(region.host)? as u64;
            (offset < region.len).then(|| region.first + index(offset / UNIT))
        })
    }

    /// How many units are stored and not there.
    pub(super) fn left(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }

    /// How many units there are.
    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    /// Whether the unit is stored, missing and read by nobody.
    pub(super) fn is_missing(&self, unit: usize) -> bool {
        self.states[unit].load(Ordering::Acquire) == STORED
    }

    /// Takes a unit that faulted.
    pub(super) fn claim(&self, unit: usize) -> Claim {
        if self.take(unit) {
            return Claim::Read;
        }
        match self.states[unit].load(Ordering::Acquire) {
            ZERO => Claim::Zero,
            PRESENT => Claim::Present,
            _ => Claim::Busy,
        }
    }

    fn take(&self, unit: usize) -> bool {
        let state = &self.states[unit];
        state.compare_exchange(STORED, READING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Takes the unit and those after it that are missing too, `most` at most and none of another
    /// [`BLOCK`]; none if it is not missing.
    pub(super) fn claim_run(&self, unit: usize, most: usize) -> Option<Piece> {
        if !self.take(unit) {
            return None;
        }
        let region = self.region(unit);
        let host = region.host + (unit - region.first) * index(UNIT);
        let to_block_end = (index(BLOCK) - host % index(BLOCK)).div_ceil(index(UNIT));
        let end = region.first + index(region.len.div_ceil(UNIT));
        let end = end.min(unit + most.min(to_block_end));
        let count = 1 + (unit + 1..end).take_while(|&next| self.take(next)).count();
        Some(self.piece(unit, count))
    }

    /// `count` units of one region as bytes.
    pub(super) fn piece(&self, unit: usize, count: usize) -> Piece {
        let region = self.region(unit);
        let start = (unit - region.first) as u64 * UNIT;
        let len = (count as u64 * UNIT).min(region.len - start);
        let (host, offset) = (region.host + index(start), region.offset + start);
        Piece { unit, count, host, offset, len }
    }

    fn region(&self, unit: usize) -> &Region {
        let after = self.regions.partition_point(|region| region.first <= unit);
        &self.regions[after.saturating_sub(1)]
    }

    /// The pages of a claimed piece are there. Tells whether they were the last.
    pub(super) fn filled(&self, piece: &Piece) -> bool {
        for state in &self.states[piece.unit..piece.unit + piece.count] {
            state.store(PRESENT, Ordering::Release);
        }
        self.left.fetch_sub(piece.count, Ordering::AcqRel) == piece.count
    }

    /// A unit that is zero is there.
    pub(super) fn zeroed(&self, unit: usize) {
        self.states[unit].store(PRESENT, Ordering::Release);
    }

    /// A claimed piece could not be read.
    pub(super) fn give_back(&self, piece: &Piece) {
        for state in &self.states[piece.unit..piece.unit + piece.count] {
            state.store(STORED, Ordering::Release);
        }
    }
}

/// The runs of stored units, those with fewer than `gap` others in between taken together, unless one of these
/// is mapped.
fn stretches(states: &mut [AtomicU8], gap: usize) -> Vec<Range<usize>> {
    let mut stretches: Vec<Range<usize>> = Vec::new();
    let mut apart = false;
    for (unit, state) in states.iter_mut().enumerate() {
        match *state.get_mut() {
            STORED => {}
            state => {
                apart |= state == MAPPED;
                continue;
            }
        }
        match stretches.last_mut() {
            Some(last) if !apart && unit - last.end < gap => last.end = unit + 1,
            _ => stretches.push(unit..unit + 1),
        }
        apart = false;
    }
    stretches
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::format::ram::StateOffset;

    fn units(stored: &[Stored]) -> Units {
        let ranges = [(GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), (1 << 20) + 4096)];
        let ram = GuestMemory::from_ranges(&ranges).unwrap();
        let ranges = ranges.map(|(start, len)| (start, len as u64));
        Units::new(&ram, &RamLayout::new(StateOffset(0), ranges).unwrap(), stored)
    }

    #[test]
    fn parts_with_a_long_gap_are_watched_apart_and_a_short_gap_is_zero() {
        let mut units =
            units(&[Stored(0, 0, UNIT), Stored(0, 3 * UNIT, UNIT), Stored(0, 8 << 20, 4096)]);
        assert_eq!(units.left(), 3);
        let host = units.regions[0].host;
        assert_eq!(units.ranges(), [(host, 4 * UNIT), (host + (8 << 20), UNIT)]);
        assert_eq!(units.claim(1), Claim::Zero);
        assert_eq!(units.claim(10), Claim::Present);
    }

    #[test]
    fn what_is_mapped_is_not_watched() {
        let stored = [Stored(0, 0, UNIT), Stored(0, 2 * UNIT, 1), Stored(0, 4 * UNIT, UNIT)];
        let mut units = units(&stored).beside(&[Stored(0, UNIT, UNIT), Stored(0, 6 * UNIT, UNIT)]);
        assert_eq!(units.left(), 3);
        let host = units.regions[0].host;
        let apart = [(host, UNIT), (host + index(2 * UNIT), 3 * UNIT)];
        assert_eq!(units.ranges(), apart);
        assert_eq!(units.claim(1), Claim::Present);
        assert_eq!(units.claim(3), Claim::Zero);
        assert_eq!(units.claim_run(0, 8).unwrap().count, 1);
    }

    #[test]
    fn a_region_may_end_within_a_unit() {
        let mut units = units(&[Stored(1, 1 << 20, 4096)]);
        let ranges = units.ranges();
        assert_eq!(ranges, [(units.regions[1].host + (1 << 20), 4096)]);
        let unit = units.at(ranges[0].0 + 4095).unwrap();
        // The host may have put the other region right behind it.
        let behind = units.at(ranges[0].0 + 4096);
        assert!(behind.is_none_or(|unit| unit < units.regions[1].first), "{behind:?}");
        let piece = units.claim_run(unit, 8).unwrap();
        assert_eq!((piece.len, piece.count), (4096, 1));
        assert!(units.filled(&piece));
    }

    #[test]
    fn a_run_ends_with_its_block() {
        let per_block = index(BLOCK / UNIT);
        let units = units(&[Stored(0, 0, 8 << 20)]);
        // The host may have put the region anywhere.
        let before = (index(BLOCK) - units.regions[0].host % index(BLOCK)).div_ceil(index(UNIT));
        let piece = units.claim_run(before - 1, per_block).unwrap();
        assert_eq!((piece.unit, piece.count), (before - 1, 1));
        let piece = units.claim_run(before, 2 * per_block).unwrap();
        assert_eq!((piece.unit, piece.count), (before, per_block));
    }

    #[test]
    fn a_unit_is_claimed_once_and_again_after_a_failure() {
        let units = units(&[Stored(0, 0, 4 * UNIT)]);
        let piece = units.claim_run(1, 2).unwrap();
        assert_eq!((piece.unit, piece.count, piece.len), (1, 2, 2 * UNIT));
        assert_eq!(units.claim_run(2, 8), None);
        assert_eq!(units.claim(1), Claim::Busy);
        units.give_back(&piece);
        assert_eq!(units.claim(1), Claim::Read);
        assert!(!units.filled(&units.piece(1, 1)));
        assert_eq!(units.claim_run(2, 8).unwrap().count, 2);
        assert_eq!(units.left(), 3);
    }
}
