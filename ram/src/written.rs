//! The pages of a region that the host wrote.
//!
//! vm-memory's own bitmap is looked at word by word, with a locked instruction each, whatever was written: 0.1 ms for 4 GiB. Here
//! a second bitmap tells which words may have a bit.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const PAGE: usize = 4096;
/// Bits of a word.
const WORD: usize = 64;

/// A bit for each page of a region. Any thread marks pages; a mark that comes while they are taken is taken this time or
/// the next.
#[derive(Debug, Default)]
pub struct Written {
    pages: usize,
    /// Bit `n % 64` of word `n / 64` is page `n`.
    words: Vec<AtomicU64>,
    /// The same for words: set after a bit in the word was.
    used: Vec<AtomicU64>,
}

impl Written {
    /// Takes the marks, 64 pages at a time: `take` gets the number of the first of them, and a bit for each that is
    /// marked.
    pub fn take(&self, mut take: impl FnMut(u64, u64)) {
        for (group, used) in self.used.iter().enumerate() {
            if used.load(Ordering::SeqCst) == 0 {
                continue;
            }
            // Before the words: a mark that comes in between sets its bit here again.
            let mut rest = used.swap(0, Ordering::SeqCst);
            while rest != 0 {
                let at = group * WORD + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                let word = self.words.get(at).map_or(0, |word| word.swap(0, Ordering::SeqCst));
                if word != 0 {
                    take((at * WORD) as u64, word);
                }
            }
        }
    }

    /// Takes the marks and forgets them.
    pub fn reset(&self) {
        self.take(|_, _| ());
    }

    fn mark(&self, at: usize, bits: u64) {
        self.words[at].fetch_or(bits, Ordering::SeqCst);
        let (group, bit) = (&self.used[at / WORD], 1 << (at % WORD));
        // Whoever takes it after this look takes the word after the mark.
        if group.load(Ordering::SeqCst) & bit == 0 {
            group.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Written {
    /// What is past the end is left out.
    fn mark_dirty(&self, offset: usize, len: usize) {
        let end = offset.saturating_add(len).div_ceil(PAGE).min(self.pages);
        let mut page = offset / PAGE;
        while len > 0 && page < end {
            let (at, first) = (page / WORD, page % WORD);
            let count = (WORD - first).min(end - page);
            self.mark(at, (u64::MAX >> (WORD - count)) << first);
            page += count;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        let word = self.words.get(page / WORD);
        word.is_some_and(|word| word.load(Ordering::SeqCst) & 1 << (page % WORD) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for Written {
    fn with_len(len: usize) -> Self {
        let zeroes = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let pages = len.div_ceil(PAGE);
        let words = pages.div_ceil(WORD);
        Self { pages, words: zeroes(words), used: zeroes(words.div_ceil(WORD)) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    const PAGES: usize = WORD * WORD * 2 + 100;

    fn new() -> Written {
        Written::with_len(PAGES * PAGE - 1)
    }

    fn taken(written: &Written) -> BTreeSet<usize> {
        let mut pages = BTreeSet::new();
        written.take(|first, bits| {
            let first = usize::try_from(first).unwrap();
            pages.extend((0..WORD).filter(|bit| bits & 1 << bit != 0).map(|bit| first + bit));
        });
        pages
    }

    #[test]
    fn what_was_marked_is_taken_once_and_nothing_past_the_end() {
        let written = new();
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..200 {
            let mut expected = BTreeSet::new();
            for _ in 0..random.usize(0..4) {
                let offset = random.usize(0..PAGES * PAGE + 20 * PAGE);
                let len = random.usize(0..300 * PAGE) * random.usize(0..2);
                written.mark_dirty(offset, len);
                let end = (offset + len).div_ceil(PAGE).min(PAGES);
                expected.extend(offset / PAGE..if len == 0 { 0 } else { end });
            }
            for page in [0, 63, 64, 4095, 4096, PAGES - 1, PAGES] {
                assert_eq!(written.dirty_at(page * PAGE + 5), expected.contains(&page));
            }
            assert_eq!(taken(&written), expected);
            assert!(taken(&written).is_empty());
        }
        written.mark_dirty(0, usize::MAX);
        assert_eq!(taken(&written).len(), PAGES);
        written.mark_dirty(5 * PAGE, 1);
        written.reset();
        assert!(taken(&written).is_empty());
    }

    #[test]
    fn no_mark_is_lost_while_others_are_taken() {
        let (written, done) = (new(), AtomicBool::new(false));
        // Each thread has pages of its own in words that all share, marked one after the other.
        let seen: BTreeSet<usize> = thread::scope(|scope| {
            let markers: Vec<_> = (0..4)
                .map(|thread| {
                    let written = &written;
                    scope.spawn(move || {
                        (thread..PAGES)
                            .step_by(4)
                            .for_each(|page| written.mark_dirty(page * PAGE, 1));
                    })
                })
                .collect();
            let taker = scope.spawn(|| {
                let mut seen = BTreeSet::new();
                while !done.load(Ordering::SeqCst) {
                    seen.append(&mut taken(&written));
                }
                seen.append(&mut taken(&written));
                seen
            });
            markers.into_iter().for_each(|marker| marker.join().unwrap());
            done.store(true, Ordering::SeqCst);
            taker.join().unwrap()
        });
        assert_eq!(seen.len(), PAGES);
    }
}
