//! Sets of guest pages, one bit a page.

use std::ops::Range;

use crate::units::{PAGE, index};

const WORD: u64 = 64;
/// Words that one word of [`Bits::used`] is of.
const GROUP: usize = 64;

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

/// The pages of one region. Bits past the last page are 0.
#[derive(Debug, Clone)]
struct Bits {
    pages: u64,
    words: Vec<u64>,
    /// One bit for a word, which may be 0 all the same; where there is no bit the word is 0.
    used: Vec<u64>,
}

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.pages == other.pages && self.words == other.words
    }
}

impl Eq for Bits {}

impl PageSet {
    /// The empty set over regions of so many pages each.
    pub fn empty(regions: impl IntoIterator<Item = u64>) -> Self {
        let bits = |pages: u64| {
            let words = pages.div_ceil(WORD);
            let used = vec![0; index(words.div_ceil(WORD))];
            Bits { pages, words: vec![0; index(words)], used }
        };
        Self { regions: regions.into_iter().map(bits).collect() }
    }

    /// The empty set over all of `memory`.
    pub fn of<M: vm_memory::GuestMemoryBackend>(memory: &M) -> Self {
        use vm_memory::GuestMemoryRegion;
        Self::empty(memory.iter().map(|region| region.len() / PAGE))
    }

    /// The empty set over the same RAM.
    pub fn empty_like(&self) -> Self {
        Self::empty(self.regions.iter().map(|bits| bits.pages))
    }

    /// How many pages each region has.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.regions.iter().map(|bits| bits.pages)
    }

    /// Puts every page in.
    pub fn insert_all(&mut self) {
        for bits in &mut self.regions {
            bits.words.fill(u64::MAX);
            bits.used.fill(u64::MAX);
            bits.cut();
        }
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        for bits in &mut self.regions {
            bits.change_used(|_| 0);
            bits.used.fill(0);
        }
    }

    /// Puts a run in; what is past the end of its region is left out.
    pub fn insert(&mut self, run: PageRun) {
        if let Some(bits) = self.regions.get_mut(run.region) {
            for (at, mask) in bits.masks(run) {
                bits.insert_word(at, mask);
            }
        }
    }

    /// Takes a run out.
    pub fn remove(&mut self, run: PageRun) {
        if let Some(bits) = self.regions.get_mut(run.region) {
            for (at, mask) in bits.masks(run) {
                bits.words[at] &= !mask;
            }
        }
    }

    /// Whether the page is in the set.
    pub fn contains(&self, region: usize, page: u64) -> bool {
        self.regions.get(region).is_some_and(|bits| {
            page < bits.pages && bits.words[index(page / WORD)] & 1 << (page % WORD) != 0
        })
    }

    /// Whether any page of the run is in the set.
    pub fn contains_any(&self, run: PageRun) -> bool {
        self.regions
            .get(run.region)
            .is_some_and(|bits| bits.masks(run).any(|(at, mask)| bits.words[at] & mask != 0))
    }

    /// Puts pages in as KVM and atomic bitmaps have them: bit `n % 64` of word `n / 64` is page `n`.
    pub fn insert_words(&mut self, region: usize, words: &[u64]) {
        self.insert_words_at(region, 0, words);
    }

    /// The same of a part of the region: page 0 there is page `first` of the region, a multiple of 64.
    pub fn insert_words_at(&mut self, region: usize, first: u64, words: &[u64]) {
        debug_assert!(first.is_multiple_of(WORD), "page {first} has no word of its own");
        let from = index(first / WORD);
        if let Some(bits) = self.regions.get_mut(region) {
            let words = words.get(..bits.words.len().saturating_sub(from)).unwrap_or(words);
            for (group, words) in words.chunks(GROUP).enumerate() {
                // Without a branch for each word: nearly all are 0.
                if words.iter().fold(0, |any, word| any | word) == 0 {
                    continue;
                }
                let at = from + group * GROUP;
                for (at, more) in (at..).zip(words).filter(|(_, more)| **more != 0) {
                    bits.insert_word(at, *more);
                }
            }
            bits.cut();
        }
    }

    /// The pages of a region as [`PageSet::insert_words`] takes them.
    pub fn words(&self, region: usize) -> &[u64] {
        self.regions.get(region).map_or(&[], |bits| &bits.words)
    }

    /// Puts all pages of `other` in.
    pub fn union(&mut self, other: &Self) {
        self.check_same(other);
        for (bits, other) in self.regions.iter_mut().zip(&other.regions) {
            let words = bits.words.len();
            for at in other.used().take_while(|at| *at < words) {
                bits.insert_word(at, other.words[at]);
            }
            bits.cut();
        }
    }

    /// Takes all pages of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |word, other| word & !other);
    }

    /// Leaves only pages that are in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        self.combine(other, |word, other| word & other);
    }

    /// The set as it is; what is left is empty.
    pub fn take(&mut self) -> Self {
        let empty = self.empty_like();
        std::mem::replace(self, empty)
    }

    /// How many pages are in.
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|bits| bits.used().map(|at| bits.words[at]));
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// How many bytes the pages in the set have.
    pub fn bytes(&self) -> u64 {
        self.count() * PAGE
    }

    /// How many pages of the run are in.
    pub fn count_in(&self, run: PageRun) -> u64 {
        let Some(bits) = self.regions.get(run.region) else { return 0 };
        let ones = |(at, mask): (usize, u64)| u64::from((bits.words[at] & mask).count_ones());
        bits.masks(run).map(ones).sum()
    }

    /// Whether no page is in.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(|bits| bits.used().all(|at| bits.words[at] == 0))
    }

    /// The pages as runs that are as long as can be, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let whole =
            |(region, bits): (usize, &Bits)| PageRun { region, first: 0, count: bits.pages };
        self.regions.iter().enumerate().map(whole).flat_map(|region| self.runs_in(region))
    }

    /// The pages of a part of RAM as runs, in order.
    pub fn runs_in(&self, part: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let bits = self.regions.get(part.region);
        let mut from = part.first;
        std::iter::from_fn(move || {
            let bits = bits?;
            let stop = part.end().min(bits.pages);
            let first = bits.next(from, false).filter(|first| *first < stop)?;
            let end = bits.next(first, true).unwrap_or(stop).min(stop);
            from = end;
            Some(PageRun { first, count: end - first, ..part })
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

    /// Changes what is in, with what the other has there; pages are taken out only.
    fn combine(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        self.check_same(other);
        for (bits, other) in self.regions.iter_mut().zip(&other.regions) {
            bits.change_used_at(|at, word| with(word, other.words.get(at).copied().unwrap_or(0)));
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

impl Bits {
    /// Clears what is past the last page.
    fn cut(&mut self) {
        let used = self.pages % WORD;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// The words of a run and which of their bits are in it.
    fn masks(&self, run: PageRun) -> impl Iterator<Item = (usize, u64)> + use<> {
        let (first, end) = (run.first, run.end().min(self.pages));
        let words: Range<u64> = if first < end { first / WORD..end.div_ceil(WORD) } else { 0..0 };
        words.map(move |at| {
            let from = first.saturating_sub(at * WORD);
            let to = (end - at * WORD).min(WORD);
            let below = |bit: u64| if bit == WORD { u64::MAX } else { (1 << bit) - 1 };
            (index(at), below(to) & !below(from))
        })
    }

    /// The words that may be other than 0.
    fn used(&self) -> impl Iterator<Item = usize> + '_ {
        let words = self.words.len();
        (0..).zip(&self.used).flat_map(move |(group, used)| {
            let mut rest = *used;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(index(group * WORD + u64::from(bit)))
            })
            .take_while(move |at| *at < words)
        })
    }

    /// Puts bits in a word.
    fn insert_word(&mut self, at: usize, more: u64) {
        self.words[at] |= more;
        self.used[at / GROUP] |= 1 << (at % GROUP);
    }

    fn change_used(&mut self, change: impl Fn(u64) -> u64) {
        self.change_used_at(|_, word| change(word));
    }

    /// Changes the words that are other than 0.
    fn change_used_at(&mut self, change: impl Fn(usize, u64) -> u64) {
        let Self { words, used, .. } = self;
        for (group, used) in used.iter().enumerate() {
            let mut rest = *used;
            while rest != 0 {
                let at = group * GROUP + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                if let Some(word) = words.get_mut(at) {
                    *word = change(at, *word);
                }
            }
        }
    }

    /// The first page from `from` that is in the set, or with `absent`, that is not.
    fn next(&self, from: u64, absent: bool) -> Option<u64> {
        let flip = if absent { u64::MAX } else { 0 };
        let mut at = from / WORD;
        let mut word = (self.words.get(index(at))? ^ flip) & u64::MAX << (from % WORD);
        while word == 0 {
            at = if absent { at + 1 } else { self.next_used(at + 1)? };
            word = self.words.get(index(at))? ^ flip;
        }
        let page = at * WORD + u64::from(word.trailing_zeros());
        (page < self.pages).then_some(page)
    }

    /// The first word from `from` that may be other than 0.
    fn next_used(&self, from: u64) -> Option<u64> {
        let mut group = from / WORD;
        let mut used = self.used.get(index(group))? & u64::MAX << (from % WORD);
        while used == 0 {
            group += 1;
            used = *self.used.get(index(group))?;
        }
        Some(group * WORD + u64::from(used.trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const REGIONS: [u64; 3] = [200, 64, 1];

    fn run(region: usize, first: u64, count: u64) -> PageRun {
        PageRun { region, first, count }
    }

    fn pages(set: &PageSet) -> BTreeSet<(usize, u64)> {
        let all = REGIONS.iter().enumerate().flat_map(|(at, n)| (0..*n).map(move |p| (at, p)));
        all.filter(|(at, page)| set.contains(*at, *page)).collect()
    }

    fn from_model(model: &BTreeSet<(usize, u64)>) -> PageSet {
        let mut set = PageSet::empty(REGIONS);
        for (region, page) in model {
            set.insert(run(*region, *page, 1));
        }
        set
    }

    fn model() -> impl Strategy<Value = BTreeSet<(usize, u64)>> {
        let spot = (0..3_usize, 0..200_u64, 1..80_u64);
        prop::collection::vec(spot, 0..12).prop_map(|runs| {
            let each = |(region, first, count): (usize, u64, u64)| {
                (first..(first + count).min(REGIONS[region])).map(move |page| (region, page))
            };
            runs.into_iter().flat_map(each).collect()
        })
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_pages(a in model(), b in model()) {
            let (left, right) = (from_model(&a), from_model(&b));
            prop_assert_eq!(pages(&left), a.clone());
            prop_assert_eq!(left.count(), a.len() as u64);
            prop_assert_eq!(left.is_empty(), a.is_empty());
            let mut set = left.clone();
            set.union(&right);
            prop_assert_eq!(pages(&set), a.union(&b).copied().collect());
            let mut set = left.clone();
            set.subtract(&right);
            prop_assert_eq!(pages(&set), a.difference(&b).copied().collect());
            let mut set = left.clone();
            set.intersect(&right);
            prop_assert_eq!(pages(&set), a.intersection(&b).copied().collect());
            let mut words = PageSet::empty(REGIONS);
            for region in 0..3 {
                words.insert_words(region, left.words(region));
            }
            prop_assert_eq!(words, left);
        }

        #[test]
        fn runs_are_maximal_in_order_and_cover_the_set(a in model()) {
            let set = from_model(&a);
            let runs: Vec<_> = set.runs().collect();
            let covered = runs.iter().flat_map(|r| (r.first..r.end()).map(|page| (r.region, page)));
            prop_assert!(covered.eq(a.iter().copied()));
            for pair in runs.windows(2) {
                let apart = pair[0].region < pair[1].region || pair[0].end() < pair[1].first;
                prop_assert!(apart, "{:?}", pair);
            }
        }

        #[test]
        fn groups_are_whole_and_no_more_than_needed(a in model(), size in 1..90_u64) {
            let expected: BTreeSet<_> = (0..3_usize)
                .flat_map(|region| (0..REGIONS[region]).map(move |page| (region, page)))
                .filter(|(region, page)| a.iter().any(|(r, p)| r == region && p / size == page / size))
                .collect();
            prop_assert_eq!(pages(&from_model(&a).in_groups(size)), expected);
        }

        #[test]
        fn a_run_is_put_in_and_taken_out_whole(
            a in model(), region in 0..3_usize, first in 0..250_u64, count in 0..250_u64,
        ) {
            let inside = |(r, page): &(usize, u64)| {
                *r == region && (first..first + count).contains(page)
            };
            let mut set = from_model(&a);
            prop_assert_eq!(set.contains_any(run(region, first, count)), a.iter().any(inside));
            let within: Vec<_> = a.iter().copied().filter(inside).collect();
            prop_assert_eq!(set.count_in(run(region, first, count)), within.len() as u64);
            let runs = set.runs_in(run(region, first, count));
            let runs: Vec<_> = runs.flat_map(|r| (r.first..r.end()).map(move |p| (region, p))).collect();
            prop_assert_eq!(runs, within);
            set.remove(run(region, first, count));
            prop_assert_eq!(pages(&set), a.iter().copied().filter(|p| !inside(p)).collect());
            set.insert(run(region, first, count));
            let end = (first + count).min(REGIONS[region]);
            let mut both = a.clone();
            both.extend((first..end).map(|page| (region, page)));
            prop_assert_eq!(pages(&set), both);
        }
    }

    #[test]
    fn words_with_bits_past_the_end_add_no_pages() {
        let mut set = PageSet::empty(REGIONS);
        set.insert_words(2, &[u64::MAX, u64::MAX]);
        assert_eq!(set.count(), 1);
        set.insert(run(7, 0, 1));
        assert_eq!(set.runs().collect::<Vec<_>>(), [run(2, 0, 1)]);
    }

    #[test]
    fn words_of_a_part_are_put_in_where_it_begins_and_not_past_the_end() {
        let mut set = PageSet::empty([200, 64 * 100]);
        set.insert_words_at(0, 128, &[1, u64::MAX, u64::MAX]);
        set.insert_words_at(0, 256, &[u64::MAX]);
        set.insert_words_at(1, 64 * 62, &[1, 0, 6, 0]);
        let expected = [run(0, 128, 1), run(0, 192, 8), run(1, 64 * 62, 1), run(1, 64 * 64 + 1, 2)];
        assert_eq!(set.runs().collect::<Vec<_>>(), expected);
        assert_eq!(set.count(), 12);
    }

    #[test]
    fn pages_far_apart_are_found_and_a_cleared_set_is_as_new() {
        const FAR: [u64; 6] = [0, 4095, 4096, 4160, 300_000, 999_999];
        let mut set = PageSet::empty([3, 1_000_000]);
        for first in FAR {
            set.insert(run(1, first, 1));
        }
        let mut words = set.empty_like();
        words.insert_words(1, set.words(1));
        let mut united = set.empty_like();
        united.union(&words);
        assert_eq!(united, set);
        assert_eq!(united.count(), 6);
        let found: Vec<_> = united.runs().flat_map(|r| r.first..r.end()).collect();
        assert_eq!(found, FAR);
        united.remove(run(1, 4096, 100_000));
        assert_eq!(united.count(), 4);
        assert_eq!(united.runs().map(|r| r.first).collect::<Vec<_>>(), [0, 4095, 300_000, 999_999]);
        set.intersect(&united);
        assert_eq!(set, united);
        for mut set in [set, united] {
            set.insert_all();
            assert_eq!(set.count(), 1_000_003);
            set.clear();
            assert!(set.is_empty());
            assert_eq!(set, PageSet::empty([3, 1_000_000]));
        }
    }

    #[test]
    fn take_leaves_nothing_and_all_is_all() {
        let mut set = PageSet::empty(REGIONS);
        set.insert_all();
        let taken = set.take();
        assert!(set.is_empty());
        assert_eq!(taken.count(), 265);
        assert_eq!(taken.bytes(), 265 * 4096);
        assert_eq!(taken.runs().collect::<Vec<_>>(), [run(0, 0, 200), run(1, 0, 64), run(2, 0, 1)]);
    }

    #[test]
    fn pieces_end_at_multiples() {
        let pieces: Vec<_> = run(1, 5, 20).pieces(8).map(|p| (p.first, p.count)).collect();
        assert_eq!(pieces, [(5, 3), (8, 8), (16, 8), (24, 1)]);
        assert_eq!(run(0, 8, 8).pieces(8).count(), 1);
    }
}
