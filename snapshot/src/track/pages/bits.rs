//! The pages of one region as bits. A second level, one bit for a word of the first, tells where to look: most
//! sets have few pages.

use std::ops::Range;

use super::PageRun;
use crate::units::index;

const WORD: u64 = 64;
/// Words that one word of [`Bits::used`] is of.
const GROUP: usize = 64;

/// The pages of one region. Bits past the last page are 0.
#[derive(Debug, Clone)]
pub(super) struct Bits {
    pages: u64,
    words: Vec<u64>,
    /// One bit for a word, which may be 0 all the same; where there is no bit the word is 0.
    used: Vec<u64>,
}

// Equal are sets of the same pages; what `used` has too much does not count.
impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.pages == other.pages && self.words == other.words
    }
}

impl Eq for Bits {}

impl Bits {
    /// None of so many pages.
    pub(super) fn empty(pages: u64) -> Self {
        let words = pages.div_ceil(WORD);
        let used = vec![0; index(words.div_ceil(WORD))];
        Self { pages, words: vec![0; index(words)], used }
    }

    /// How many pages the region has.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Bit `n % 64` of word `n / 64` is page `n`.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn insert_all(&mut self) {
        self.words.fill(u64::MAX);
        self.used.fill(u64::MAX);
        self.cut();
    }

    pub(super) fn clear(&mut self) {
        self.change_used(|_, _| 0);
        self.used.fill(0);
    }

    pub(super) fn insert(&mut self, run: PageRun) {
        for (at, mask) in self.masks(run) {
            self.insert_word(at, mask);
        }
    }

    pub(super) fn remove(&mut self, run: PageRun) {
        for (at, mask) in self.masks(run) {
            self.words[at] &= !mask;
        }
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[index(page / WORD)] & 1 << (page % WORD) != 0
    }

    pub(super) fn contains_any(&self, run: PageRun) -> bool {
        self.masks(run).any(|(at, mask)| self.words[at] & mask != 0)
    }

    /// Puts in what `words` have, of which the first begins with page `first`, a multiple of 64.
    pub(super) fn insert_words(&mut self, first: u64, words: &[u64]) {
        debug_assert!(first.is_multiple_of(WORD), "page {first} has no word of its own");
        let from = index(first / WORD);
        let words = words.get(..self.words.len().saturating_sub(from)).unwrap_or(words);
        for (group, words) in words.chunks(GROUP).enumerate() {
            // Without a branch for each word: nearly all are 0.
            if words.iter().fold(0, |any, word| any | word) == 0 {
                continue;
            }
            let at = from + group * GROUP;
            for (at, more) in (at..).zip(words).filter(|(_, more)| **more != 0) {
                self.insert_word(at, *more);
            }
        }
        self.cut();
    }

    pub(super) fn union(&mut self, other: &Self) {
        let words = self.words.len();
        for at in other.used().take_while(|at| *at < words) {
            self.insert_word(at, other.words[at]);
        }
        self.cut();
    }

    /// Each word becomes what `with` makes of it and the other's, which has no bit that was not there.
    pub(super) fn reduce(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        self.change_used(|at, word| with(word, other.words.get(at).copied().unwrap_or(0)));
    }

    pub(super) fn count(&self) -> u64 {
        self.used().map(|at| u64::from(self.words[at].count_ones())).sum()
    }

    pub(super) fn count_in(&self, run: PageRun) -> u64 {
        self.masks(run).map(|(at, mask)| u64::from((self.words[at] & mask).count_ones())).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.used().all(|at| self.words[at] == 0)
    }

    /// The first run from page `from`, as long as can be but not beyond page `stop`.
    pub(super) fn next_run(&self, from: u64, stop: u64) -> Option<Range<u64>> {
        let stop = stop.min(self.pages);
        let first = self.next(from, false).filter(|first| *first < stop)?;
        Some(first..self.next(first, true).unwrap_or(stop).min(stop))
    }

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

    /// Changes the words that are other than 0.
    fn change_used(&mut self, change: impl Fn(usize, u64) -> u64) {
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
