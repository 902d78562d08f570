//! Pages of guest RAM copied while the guest stands still, to be written when it runs again.

use crate::memory::{Copies, RamSlice};
use crate::track::{PageRun, PageSet};

/// Room for copies of pages. It is made and touched before the guest is stopped, so that the host
/// need not find memory in the pause.
pub struct Room(Copies);

impl Room {
    /// Room for so many pages.
    pub fn new(pages: u64) -> Self {
        Self(Copies::room(pages))
    }
}

/// Copies of pages.
pub struct Aside {
    pages: PageSet,
    /// In the order of the set.
    copies: Copies,
    /// By region, how many copies come before its first one.
    before: Vec<u64>,
}

impl Aside {
    /// Copies `pages`. Nobody writes to them meanwhile. Where there is not enough room, more is made.
    pub(crate) fn copy(ram: &[RamSlice<'_>], pages: PageSet, room: Room) -> Self {
        let Room(mut copies) = room;
        copies.resize(pages.count());
        let mut before = Vec::with_capacity(ram.len());
        let mut at = 0;
        for run in pages.runs() {
            while before.len() <= run.region {
                before.push(at);
            }
            copies.fill(at, ram, run);
            at += run.count;
        }
        before.resize(ram.len(), at);
        Self { pages, copies, before }
    }

    /// Which pages there are.
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// The copies of pages of `part`, run by run.
    pub(crate) fn runs_in(&self, part: PageRun) -> impl Iterator<Item = (PageRun, &[u8])> {
        let start = PageRun { first: 0, count: part.first, ..part };
        let mut at = self.before[part.region] + self.pages.count_in(start);
        self.pages.runs_in(part).map(move |run| {
            let bytes = self.copies.bytes_of(at, run.count);
            at += run.count;
            (run, bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::units::PAGE;
    use crate::{GuestMemory, memory};

    #[test]
    fn copies_are_those_of_the_pages_whatever_is_written_later() {
        let regions = [(GuestAddress(0), 64 << 12), (GuestAddress(1 << 30), 64 << 12)];
        let ram = GuestMemory::from_ranges(&regions).unwrap();
        let mut pages = PageSet::of(&ram);
        for (region, first, count) in [(0, 3, 2), (0, 40, 1), (1, 0, 1), (1, 30, 8)] {
            pages.insert(PageRun { region, first, count });
        }
        let address = |region: usize, page: u64| regions[region].0.0 + page * PAGE;
        for run in pages.runs() {
            for page in run.first..run.end() {
                let at = address(run.region, page);
                ram.write_obj(at ^ 0x55, GuestAddress(at)).unwrap();
            }
        }
        for room in [0, 12, 100] {
            let aside = Aside::copy(&memory::slices(&ram), pages.clone(), Room::new(room));
            ram.write_obj(0_u64, GuestAddress(3 * PAGE)).unwrap();
            let mut seen = 0;
            for (region, first) in [(0, 0), (0, 32), (1, 0), (1, 32)] {
                for (run, bytes) in aside.runs_in(PageRun { region, first, count: 32 }) {
                    for (page, bytes) in (run.first..).zip(bytes.chunks(4096)) {
                        let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                        assert_eq!(word, address(region, page) ^ 0x55, "{run:?}");
                        seen += 1;
                    }
                }
            }
            assert_eq!(seen, 12);
            ram.write_obj((3 * PAGE) ^ 0x55, GuestAddress(3 * PAGE)).unwrap();
        }
    }
}
