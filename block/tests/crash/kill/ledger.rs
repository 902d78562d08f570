//! What was written to a disk, sector by sector, and which of it was flushed.

use std::collections::HashMap;
use std::ops::Range;

use super::client::Request;
use crate::common::Random;

pub(crate) const SECTOR: usize = 512;
/// The number of a sector of zeroes.
const ZERO: u64 = 0;

/// What a request left in a sector.
#[derive(Debug, Clone, Copy)]
struct Content {
    number: u64,
    /// Trimmed: what was before may be there as well.
    or_before: bool,
}

/// What a sector may hold: the number of the request that is durable, and those after it.
#[derive(Debug, Clone, Default)]
struct Sector {
    durable: u64,
    /// What requests that were sent later left, answered or not, oldest first.
    later: Vec<Content>,
    /// How many of the later ones were answered.
    answered: usize,
    /// How many have become durable.
    settled: usize,
}

/// The sectors of a disk.
pub(crate) struct Ledger {
    sectors: Vec<Sector>,
    /// Requests under way, by what the caller calls them.
    under_way: HashMap<u64, (u64, Range<usize>)>,
    /// What a flush under way will make durable.
    flushing: HashMap<u64, Vec<usize>>,
    next: u64,
}

impl Ledger {
    /// A disk of zeroes.
    pub(crate) fn new(size: usize) -> Self {
        let sectors = vec![Sector::default(); size / SECTOR];
        Self { sectors, under_way: HashMap::new(), flushing: HashMap::new(), next: 1 }
    }

    /// A random request that touches nothing that is under way. What it writes is numbered.
    pub(crate) fn request(&mut self, random: &mut Random) -> (Request, Range<usize>) {
        loop {
            let count = match random.below(4) {
                0 => 1 + random.below(4),
                1 => 128,
                _ => 8 * (1 + random.below(8)),
            };
            let count = (count as usize).min(self.sectors.len());
            let mut start = random.below((self.sectors.len() - count + 1) as u64) as usize;
            if random.below(2) == 0 {
                start %= (self.sectors.len() / 16).max(count) - count + 1;
            }
            let span = start..start + count;
            let busy =
                |(_, other): &(u64, Range<usize>)| other.start < span.end && span.start < other.end;
            if self.under_way.values().any(busy) {
                continue;
            }
            let (offset, len) = ((start * SECTOR) as u64, (count * SECTOR) as u32);
            let request = match random.below(12) {
                0 => Request::Zero { offset, len },
                1 => Request::Trim { offset, len },
                _ => Request::Write {
                    offset,
                    data: span.clone().flat_map(|at| stamp(self.next, at)).collect(),
                },
            };
            return (request, span);
        }
    }

    /// Notes that a request is about to be sent under a name.
    pub(crate) fn sent(&mut self, name: u64, request: &Request, span: Range<usize>) {
        match request {
            Request::Flush => {
                let made = self.sectors.iter().map(|s| s.settled + s.answered).collect();
                self.flushing.insert(name, made);
            }
            _ => {
                let number = match request {
                    Request::Write { .. } => self.next,
                    _ => ZERO,
                };
                self.next += 1;
                let or_before = matches!(request, Request::Trim { .. });
                for sector in &mut self.sectors[span.clone()] {
                    sector.later.push(Content { number, or_before });
                }
                self.under_way.insert(name, (number, span));
            }
        }
    }

    /// Notes an answer.
    pub(crate) fn answered(&mut self, name: u64) {
        if let Some((_, span)) = self.under_way.remove(&name) {
            for sector in &mut self.sectors[span] {
                sector.answered = sector.later.len();
            }
        } else if let Some(made) = self.flushing.remove(&name) {
            for (sector, made) in self.sectors.iter_mut().zip(made) {
                // A flush that was sent later may have been answered earlier.
                let made = made.saturating_sub(sector.settled);
                // The last answered one is durable; with trims, or the last one before them.
                let trims = sector.later[..made].iter().rev().take_while(|c| c.or_before).count();
                let keep = made - trims;
                if keep > 0 {
                    sector.durable = sector.later[keep - 1].number;
                    sector.later.drain(..keep);
                    sector.answered -= keep;
                    sector.settled += keep;
                }
            }
        }
    }

    /// Whether anything was sent and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.under_way.len() + self.flushing.len()
    }

    /// Compares a disk that a kill left; what is there is durable from now on.
    pub(crate) fn settle(&mut self, disk: &[u8]) -> Result<(), String> {
        self.under_way.clear();
        self.flushing.clear();
        for (at, sector) in self.sectors.iter_mut().enumerate() {
            let bytes = &disk[at * SECTOR..(at + 1) * SECTOR];
            let found = number(bytes, at).ok_or_else(|| {
                format!("sector {at} holds what was never written: {:02x?}", &bytes[..32])
            })?;
            if found != sector.durable && sector.later.iter().all(|c| c.number != found) {
                return Err(format!("sector {at} holds request {found}, expected {sector:?}"));
            }
            *sector = Sector { durable: found, ..Sector::default() };
        }
        Ok(())
    }
}

/// A sector as a request writes it.
fn stamp(number: u64, at: usize) -> Vec<u8> {
    [number.to_be_bytes(), (at as u64).to_be_bytes()].concat().repeat(SECTOR / 16)
}

/// Which request wrote a sector.
fn number(bytes: &[u8], at: usize) -> Option<u64> {
    if bytes.iter().all(|b| *b == 0) {
        return Some(ZERO);
    }
    let number = u64::from_be_bytes(bytes[..8].try_into().unwrap());
    (bytes == stamp(number, at)).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(number: u64, at: usize) -> Request {
        Request::Write { offset: (at * SECTOR) as u64, data: stamp(number, at) }
    }

    #[test]
    fn what_was_answered_before_a_flush_must_be_there_and_the_rest_may() {
        let disk = |n: u64| [stamp(n, 0), vec![0; SECTOR]].concat();
        let run = |found: u64| {
            let mut ledger = Ledger::new(2 * SECTOR);
            ledger.sent(1, &write(1, 0), 0..1);
            ledger.answered(1);
            ledger.sent(2, &write(2, 0), 0..1);
            ledger.answered(2);
            ledger.sent(3, &Request::Flush, 0..0);
            ledger.sent(4, &write(3, 0), 0..1);
            ledger.answered(4);
            ledger.answered(3);
            ledger.settle(&disk(found))
        };
        assert!(run(1).is_err(), "overwritten before the flush");
        assert!(run(2).is_ok());
        assert!(run(3).is_ok(), "written after the flush was sent");
        assert!(run(4).is_err(), "never sent");
    }

    #[test]
    fn a_trimmed_sector_holds_zeroes_or_what_it_held() {
        for (found, allowed) in [(vec![0; SECTOR], true), (stamp(1, 0), true), (stamp(2, 0), false)]
        {
            let mut ledger = Ledger::new(SECTOR);
            ledger.sent(1, &write(1, 0), 0..1);
            ledger.answered(1);
            ledger.sent(2, &Request::Trim { offset: 0, len: 512 }, 0..1);
            ledger.answered(2);
            ledger.sent(3, &Request::Flush, 0..0);
            ledger.answered(3);
            assert_eq!(ledger.settle(&found).is_ok(), allowed);
        }
    }
}
