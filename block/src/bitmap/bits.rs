//! A large bit array that takes memory only for parts that are neither all clear nor all set.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::num::{to_u64, to_usize};

/// Words of a chunk.
const WORDS: usize = 512;
/// Bits of a chunk.
const CHUNK: u64 = 64 * 512;
/// About what a chunk costs beside its words, in bytes.
const CHUNK_COST: u64 = 32;

/// A part of the row in which some bit is set.
#[derive(Debug, Clone)]
enum Chunk {
    /// All bits that there are.
    Full,
    /// Some of them; how many, and which.
    Some(u64, Box<[u64; WORDS]>),
}

/// `len` bits. Memory goes with the chunks that are neither clear nor full, not with `len`.
#[derive(Debug, Clone)]
pub(crate) struct Bits {
    len: u64,
    count: u64,
    /// Chunks that are not clear, by index.
    chunks: BTreeMap<u64, Chunk>,
}

/// The mask of the bits `range` of a word.
fn mask(range: Range<u64>) -> u64 {
    let upper = if range.end >= 64 { u64::MAX } else { (1 << range.end) - 1 };
    upper & !((1u64 << range.start) - 1)
}

/// Ones in the words that `bits` (of one chunk) touches, with the mask of each.
fn words_of(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    (bits.start / 64..bits.end.div_ceil(64)).map(move |word| {
        let first = bits.start.max(word * 64) - word * 64;
        let last = bits.end.min(word * 64 + 64) - word * 64;
        (to_usize(word), mask(first..last))
    })
}

impl Bits {
    /// All clear.
    pub(crate) fn new(len: u64) -> Self {
        Self { len, count: 0, chunks: BTreeMap::new() }
    }

    /// How many bits are set.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// About how many bytes of memory this takes.
    pub(crate) fn memory(&self) -> u64 {
        let words = |chunk: &Chunk| match chunk {
            Chunk::Full => CHUNK_COST,
            Chunk::Some(..) => CHUNK_COST + CHUNK / 8,
        };
        self.chunks.values().map(words).sum()
    }

    /// How many bits a chunk has: the last one may be short.
    fn chunk_len(&self, index: u64) -> u64 {
        CHUNK.min(self.len.saturating_sub(index * CHUNK))
    }

    /// The chunks that `bits` touches, with the part of each.
    fn parts(&self, bits: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let end = bits.end.min(self.len);
        let start = bits.start.min(end);
        (start / CHUNK..end.div_ceil(CHUNK)).map(move |index| {
            let base = index * CHUNK;
            (index, start.max(base) - base..end.min(base + CHUNK) - base)
        })
    }

    /// Sets bits; those past the end are left out.
    pub(crate) fn set(&mut self, bits: Range<u64>) {
        for (index, part) in self.parts(bits) {
            let full = self.chunk_len(index);
            let chunk = match self.chunks.get_mut(&index) {
                Some(Chunk::Full) => continue,
                Some(chunk) => chunk,
                None if part.end - part.start == full => {
                    self.chunks.insert(index, Chunk::Full);
                    self.count += full;
                    continue;
                }
                None => self.chunks.entry(index).or_insert(Chunk::Some(0, Box::new([0; WORDS]))),
            };
            if let Chunk::Some(count, words) = chunk {
                for (word, mask) in words_of(part) {
                    let new = u64::from((mask & !words[word]).count_ones());
                    words[word] |= mask;
                    *count += new;
                    self.count += new;
                }
                if *count == full {
                    *chunk = Chunk::Full;
                }
            }
        }
    }

    /// Clears bits.
    pub(crate) fn clear(&mut self, bits: Range<u64>) {
        // Whole chunks in the middle go without a look at what lies between them.
        let end = bits.end.min(self.len);
        let indices: Vec<u64> = match bits.start < end {
            true => self
                .chunks
                .range(bits.start / CHUNK..end.div_ceil(CHUNK))
                .map(|(i, _)| *i)
                .collect(),
            false => Vec::new(),
        };
        for index in indices {
            let base = index * CHUNK;
            let full = self.chunk_len(index);
            let part = bits.start.max(base) - base..end.min(base + CHUNK) - base;
            let Some(chunk) = self.chunks.get_mut(&index) else {
                continue;
            };
            if matches!(chunk, Chunk::Full) {
                if part.end - part.start == full {
                    self.count -= full;
                    self.chunks.remove(&index);
                    continue;
                }
                let mut words = Box::new([0; WORDS]);
                words_of(0..full).for_each(|(word, mask)| words[word] = mask);
                *chunk = Chunk::Some(full, words);
            }
            if let Chunk::Some(count, words) = chunk {
                for (word, mask) in words_of(part) {
                    let gone = u64::from((mask & words[word]).count_ones());
                    words[word] &= !mask;
                    *count -= gone;
                    self.count -= gone;
                }
                if *count == 0 {
                    self.chunks.remove(&index);
                }
            }
        }
    }

    /// The first set bit at or after `from`.
    pub(crate) fn next_set(&self, from: u64) -> Option<u64> {
        for (index, chunk) in self.chunks.range(from / CHUNK..) {
            let base = index * CHUNK;
            let start = from.max(base) - base;
            match chunk {
                Chunk::Full if start < self.chunk_len(*index) => return Some(base + start),
                Chunk::Full => {}
                Chunk::Some(_, words) => {
                    if let Some(bit) = scan(words, start, |word| word) {
                        return Some(base + bit);
                    }
                }
            }
        }
        None
    }

    /// The first clear bit at or after `from`; the length if there is none.
    pub(crate) fn next_clear(&self, from: u64) -> u64 {
        let mut at = from.min(self.len);
        for (index, chunk) in self.chunks.range(from / CHUNK..) {
            let base = index * CHUNK;
            if base > at {
                return at;
            }
            if let Chunk::Some(_, words) = chunk
                && let Some(bit) = scan(words, at - base, |word| !word)
            {
                return (base + bit).min(self.len);
            }
            at = base + self.chunk_len(*index);
        }
        at
    }

    /// Changes the length; bits that are added are clear, or set with `set`.
    pub(crate) fn resize(&mut self, len: u64, set: bool) {
        let old = self.len;
        if len < old {
            self.clear(len..old);
        }
        // A last chunk that was full may be partial, or a partial one full, at the new length.
        for edge in [old, len] {
            if let Some(Chunk::Full) = self.chunks.get(&(edge / CHUNK)) {
                let index = edge / CHUNK;
                let valid = self.chunk_len(index);
                let mut words = Box::new([0; WORDS]);
                words_of(0..valid).for_each(|(word, mask)| words[word] = mask);
                self.chunks.insert(index, Chunk::Some(valid, words));
            }
        }
        self.len = len;
        if let Some(chunk @ Chunk::Some(..)) = self.chunks.get_mut(&(len / CHUNK))
            && let Chunk::Some(count, _) = chunk
            && *count == CHUNK.min(len - len / CHUNK * CHUNK)
        {
            *chunk = Chunk::Full;
        }
        if set && len > old {
            self.set(old..len);
        }
    }

    /// Sets what is set in `other`, which has the same length.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (index, chunk) in &other.chunks {
            let base = index * CHUNK;
            match chunk {
                Chunk::Full => self.set(base..base + CHUNK),
                Chunk::Some(_, words) => {
                    for (at, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                        self.or_word(base + to_u64(at) * 64, *word);
                    }
                }
            }
        }
    }

    /// Sets the bits of `word` at `at`, a multiple of 64.
    fn or_word(&mut self, at: u64, word: u64) {
        let mut left = word;
        while left != 0 {
            let first = u64::from(left.trailing_zeros());
            let run = u64::from((left >> first).trailing_ones());
            self.set(at + first..at + first + run);
            left &= !mask(first..first + run);
        }
    }

    /// Whether all bits of a range are set; true for an empty one.
    pub(crate) fn all_set(&self, bits: Range<u64>) -> bool {
        self.next_clear(bits.start) >= bits.end.min(self.len)
    }

    /// Copies bits out, the first into the lowest bit of the first byte. `from` is a multiple of 64
    /// and `bytes` whole words; bits past the end are clear.
    pub(crate) fn copy_out(&self, from: u64, bytes: &mut [u8]) {
        for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
            let at = from + to_u64(n) * 64;
            let value = match self.chunks.get(&(at / CHUNK)) {
                None => 0,
                Some(Chunk::Full) => {
                    let valid = self.len.saturating_sub(at).min(64);
                    if valid == 0 { 0 } else { mask(0..valid) }
                }
                Some(Chunk::Some(_, words)) => words[to_usize(at % CHUNK / 64)],
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Sets the bits that are set in `bytes`; see [`Bits::copy_out`].
    pub(crate) fn copy_in(&mut self, from: u64, bytes: &[u8]) {
        for (n, word) in bytes.chunks(8).enumerate() {
            let mut all = [0; 8];
            all[..word.len()].copy_from_slice(word);
            self.or_word(from + to_u64(n) * 64, u64::from_le_bytes(all));
        }
    }
}

/// The first bit at or after `start` that is set in the words after `f`.
fn scan(words: &[u64; WORDS], start: u64, f: impl Fn(u64) -> u64) -> Option<u64> {
    let first = to_usize(start / 64);
    let masked = f(*words.get(first)?) & !((1u64 << (start % 64)) - 1);
    if masked != 0 {
        return Some(start / 64 * 64 + u64::from(masked.trailing_zeros()));
    }
    let (at, word) = words[first + 1..].iter().map(|w| f(*w)).enumerate().find(|(_, w)| *w != 0)?;
    Some(to_u64(first + 1 + at) * 64 + u64::from(word.trailing_zeros()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bits: &Bits, model: &[bool]) -> Result<(), TestCaseError> {
        prop_assert_eq!(bits.count(), to_u64(model.iter().filter(|bit| **bit).count()));
        let mut at = 0;
        let mut seen = vec![false; model.len()];
        while let Some(first) = bits.next_set(at) {
            let end = bits.next_clear(first);
            prop_assert!(end > first && end <= to_u64(model.len()));
            seen[to_usize(first)..to_usize(end)].fill(true);
            at = end;
        }
        prop_assert_eq!(&seen[..], model);
        let mut bytes = vec![0; model.len().div_ceil(64) * 8];
        bits.copy_out(0, &mut bytes);
        let mut back = Bits::new(to_u64(model.len()));
        back.copy_in(0, &bytes);
        prop_assert_eq!(back.count(), bits.count());
        for (index, bit) in model.iter().enumerate() {
            prop_assert_eq!(bytes[index / 8] >> (index % 8) & 1 == 1, *bit);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn random_changes_agree_with_a_row_of_bools(
            len in prop_oneof![Just(1u64), Just(32768), Just(65536), 1u64..100_000],
            ops in proptest::collection::vec(
                (0u8..6, 0u64..100_000, prop_oneof![Just(32768u64), 1u64..70_000]), 1..24),
        ) {
            let mut bits = Bits::new(len);
            let mut model = vec![false; to_usize(len)];
            for (op, from, n) in ops {
                let n = if op == 0 { 1 } else { n };
                let from = if n % 2 == 0 { from / 32768 * 32768 } else { from };
                let range = to_usize(from).min(model.len())..to_usize(from + n).min(model.len());
                match op {
                    0..=2 => { bits.set(from..from + n); model[range].fill(true); }
                    3 => { bits.clear(from..from + n); model[range].fill(false); }
                    4 => { bits.resize(from + 1, n % 3 == 0); model.resize(to_usize(from + 1), n % 3 == 0); }
                    _ => {
                        let mut other = Bits::new(to_u64(model.len()));
                        other.set(from..from + n);
                        other.clear(from + 3..from + 5);
                        bits.merge(&other);
                        for (index, bit) in model.iter_mut().enumerate() {
                            *bit |= range.contains(&index) && !(from + 3..from + 5).contains(&to_u64(index));
                        }
                    }
                }
                check(&bits, &model)?;
            }
        }
    }

    #[test]
    fn full_and_clear_parts_take_no_memory_to_speak_of() {
        let mut bits = Bits::new(20 << 30);
        bits.set(0..20 << 30);
        assert_eq!(bits.count(), 20 << 30);
        assert!(bits.memory() < 32 << 20, "{}", bits.memory());
        bits.clear(5..20 << 30);
        assert_eq!(bits.count(), 5);
        assert!(bits.memory() < 8192);
    }
}
