//! Sets of guest pages, one bit a page.

mod bits;
#[cfg(test)]
mod tests;

use bits::Bits;

use crate::units::PAGE;

/// A set of pages of guest RAM. RAM is a list of regions; a page is named by the index of its region
/// and its number there, from 0.
///
/// Two sets that meet in one operation are of the same RAM; a page that only one of them can hold is
/// left out.
///
/// What is done with a set of few pages costs as much as there are pages in it, and next to nothing for all
/// of RAM: a bit for 16 MiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    regions: Vec<Bits>,
}

/// Pages that follow each other in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Index of the region.
    pub region: usize,
    /// Number of the first page in the region.
    pub first: u64,
    /// How many pages; not 0.
    pub count: u64,
}

impl PageSet {
    /// The empty set over regions of so many pages each.
    pub fn empty(regions: impl IntoIterator<Item = u64>) -> Self {
        Self { regions: regions.into_iter().map(Bits::empty).collect() }
    }

    /// The empty set over all of `memory`.
    pub fn of<M: vm_memory::GuestMemoryBackend>(memory: &M) -> Self {
        use vm_memory::GuestMemoryRegion;
        Self::empty(memory.iter().map(|region| region.len() / PAGE))
    }

    /// The empty set over the same RAM.
    pub fn empty_like(&self) -> Self {
        Self::empty(self.regions())
    }

    /// How many pages each region has.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.regions.iter().map(Bits::pages)
    }

    /// Puts every page in.
    pub fn insert_all(&mut self) {
        self.regions.iter_mut().for_each(Bits::insert_all);
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.regions.iter_mut().for_each(Bits::clear);
    }

    /// Puts a run in; what is past the end of its region is left out.
    pub fn insert(&mut self, run: PageRun) {
        if let Some(bits) = self.regions.get_mut(run.region) {
            bits.insert(run);
        }
    }

    /// Takes a run out.
    pub fn remove(&mut self, run: PageRun) {
        if let Some(bits) = self.regions.get_mut(run.region) {
            bits.remove(run);
        }
    }

    /// Whether the page is in the set.
    pub fn contains(&self, region: usize, page: u64) -> bool {
        self.regions.get(region).is_some_and(|bits| bits.contains(page))
    }

    /// Whether any page of the run is in the set.
    pub fn contains_any(&self, run: PageRun) -> bool {
        self.regions.get(run.region).is_some_and(|bits| bits.contains_any(run))
    }

    /// Puts pages in as KVM and atomic bitmaps have them: bit `n % 64` of word `n / 64` is page `n`.
    pub fn insert_words(&mut self, region: usize, words: &[u64]) {
        self.insert_words_at(region, 0, words);
    }

    /// The same of a part of the region: page 0 there is page `first` of the region, a multiple of 64.
    pub fn insert_words_at(&mut self, region: usize, first: u64, words: &[u64]) {
        if let Some(bits) = self.regions.get_mut(region) {
            bits.insert_words(first, words);
        }
    }

    /// The pages of a region as [`PageSet::insert_words`] takes them.
    pub fn words(&self, region: usize) -> &[u64] {
        self.regions.get(region).map_or(&[], Bits::words)
    }

    /// Puts all pages of `other` in.
    pub fn union(&mut self, other: &Self) {
        self.check_same(other);
        for (bits, other) in self.regions.iter_mut().zip(&other.regions) {
            bits.union(other);
        }
    }

    /// Takes all pages of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        self.reduce(other, |word, other| word & !other);
    }

    /// Leaves only pages that are in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        self.reduce(other, |word, other| word & other);
    }

    /// The set as it is; what is left is empty.
    pub fn take(&mut self) -> Self {
        let empty = self.empty_like();
        std::mem::replace(self, empty)
    }

    /// How many pages are in.
    pub fn count(&self) -> u64 {
        self.regions.iter().map(Bits::count).sum()
    }

    /// How many bytes the pages in the set have.
    pub fn bytes(&self) -> u64 {
        self.count() * PAGE
    }

    /// How many pages of the run are in.
    pub fn count_in(&self, run: PageRun) -> u64 {
        self.regions.get(run.region).map_or(0, |bits| bits.count_in(run))
    }

    /// Whether no page is in.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(Bits::is_empty)
    }

    /// The pages as runs that are as long as can be, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let whole =
            |(region, bits): (usize, &Bits)| PageRun { region, first: 0, count: bits.pages() };
        self.regions.iter().enumerate().map(whole).flat_map(|region| self.runs_in(region))
    }

    /// The pages of a part of RAM as runs, in order.
    pub fn runs_in(&self, part: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let bits = self.regions.get(part.region);
        let mut from = part.first;
        std::iter::from_fn(move || {
            let run = bits?.next_run(from, part.end())?;
            from = run.end;
            Some(PageRun { first: run.start, count: run.end - run.start, ..part })
        })
    }

    /// The set made of whole groups of `pages` pages, counted from the start of each region, of which
    /// at least one page is in. The last group of a region may be shorter.
    pub fn in_groups(&self, pages: u64) -> Self {
        let mut grown = self.empty_like();
        let pages = pages.max(1);
        for run in self.runs() {
            let first = run.first / pages * pages;
            let end = run.end().next_multiple_of(pages);
            grown.insert(PageRun { first, count: end - first, ..run });
        }
        grown
    }

    /// Takes pages out: of each word there is left what `with` makes of it and the other's.
    fn reduce(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        self.check_same(other);
        for (bits, other) in self.regions.iter_mut().zip(&other.regions) {
            bits.reduce(other, &with);
        }
    }

    fn check_same(&self, other: &Self) {
        debug_assert!(self.regions().eq(other.regions()), "sets of different RAM");
    }
}

impl PageRun {
    /// Number of the page after the last.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Offset of the first byte in the region, in bytes.
    pub fn offset(&self) -> u64 {
        self.first * PAGE
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.count * PAGE
    }

    /// A run has a page at least; an empty one is nobody's.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The run in pieces that end at multiples of `pages` pages.
    pub fn pieces(self, pages: u64) -> impl Iterator<Item = Self> {
        let mut from = self.first;
        std::iter::from_fn(move || {
            let end = (from / pages + 1).saturating_mul(pages).min(self.end());
            let piece = Self { first: from, count: end.checked_sub(from)?, ..self };
            from = end;
            (piece.count > 0).then_some(piece)
        })
    }
}
