//! The refcounts of one block ("Refcount blocks" of the specification): big-endian numbers, or, of
//! widths below a byte, bits from the least significant on.
//!
//! Whole ranges are looked at and changed at once: a snapshot does that to every cluster of an image.

use std::ops::Range;

/// Whether one more or one less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Up,
    Down,
}

/// The refcount at `index`; its width in bits is 2 to the power of `order`.
pub(super) fn get(bytes: &[u8], index: usize, order: u32) -> u64 {
    let width = 1usize << order;
    if order < 3 {
        let bit = index * width;
        let byte = bytes.get(bit / 8).copied().unwrap_or(0);
        return u64::from(byte >> (bit % 8)) & ((1 << width) - 1);
    }
    let len = width / 8;
    bytes[index * len..][..len].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the refcount at `index`.
pub(super) fn set(bytes: &mut [u8], index: usize, order: u32, value: u64) {
    let width = 1usize << order;
    if order < 3 {
        let bit = index * width;
        let mask = ((1u8 << width) - 1) << (bit % 8);
        let [low, ..] = value.to_le_bytes();
        let byte = &mut bytes[bit / 8];
        *byte = (*byte & !mask) | (low << (bit % 8) & mask);
        return;
    }
    let len = width / 8;
    bytes[index * len..(index + 1) * len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
}

/// The bytes that hold the refcounts of a range.
pub(super) fn bytes_of(range: &Range<usize>, order: u32) -> Range<usize> {
    (range.start << order) / 8..(range.end << order).div_ceil(8)
}

/// The smallest and the largest refcount of a range that is not empty.
pub(super) fn bounds(bytes: &[u8], range: &Range<usize>, order: u32) -> (u64, u64) {
    if order == 4 {
        let (words, _) = bytes[bytes_of(range, order)].as_chunks::<2>();
        let count = |word: &[u8; 2]| u16::from_be_bytes(*word);
        let least = words.iter().map(count).fold(u16::MAX, u16::min);
        let most = words.iter().map(count).fold(0, u16::max);
        return (least.into(), most.into());
    }
    range
        .clone()
        .map(|index| get(bytes, index, order))
        .fold((u64::MAX, 0), |(least, most), n| (least.min(n), most.max(n)))
}

/// Changes all refcounts of a range by one. The caller knows from [`bounds`] that all stay within
/// the width.
pub(super) fn step(bytes: &mut [u8], range: &Range<usize>, order: u32, step: Step) {
    if order == 4 {
        let (words, _) = bytes[bytes_of(range, order)].as_chunks_mut::<2>();
        let by = if step == Step::Up { 1 } else { u16::MAX };
        for word in words {
            *word = u16::from_be_bytes(*word).wrapping_add(by).to_be_bytes();
        }
        return;
    }
    for index in range.clone() {
        let old = get(bytes, index, order);
        let new = if step == Step::Up { old.wrapping_add(1) } else { old.wrapping_sub(1) };
        set(bytes, index, order, new);
    }
}

/// The first index of a range whose refcount is `value`.
pub(super) fn find(bytes: &[u8], range: &Range<usize>, order: u32, value: u64) -> Option<usize> {
    if order == 4 {
        let wanted = u16::try_from(value).ok()?.to_be_bytes();
        let (words, _) = bytes[bytes_of(range, order)].as_chunks::<2>();
        return words.iter().position(|word| *word == wanted).map(|at| range.start + at);
    }
    range.clone().find(|index| get(bytes, *index, order) == value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 64;

    fn most(order: u32) -> u64 {
        if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 }
    }

    fn block(order: u32, values: &[u64]) -> Vec<u8> {
        let mut bytes = vec![0; LEN * 8];
        for (index, value) in values.iter().enumerate() {
            set(&mut bytes, index, order, *value);
        }
        bytes
    }

    fn read(bytes: &[u8], order: u32) -> Vec<u64> {
        (0..LEN).map(|index| get(bytes, index, order)).collect()
    }

    proptest! {
        #[test]
        fn a_refcount_of_any_width_is_read_back_and_leaves_its_neighbours_alone(
            order in 0u32..=6,
            values in proptest::collection::vec(any::<u64>(), LEN),
            changes in proptest::collection::vec((0..LEN, any::<u64>()), 0..64),
        ) {
            let mut model: Vec<u64> = values.iter().map(|v| v & most(order)).collect();
            let mut bytes = block(order, &model);
            for (index, value) in changes {
                set(&mut bytes, index, order, value & most(order));
                model[index] = value & most(order);
            }
            prop_assert_eq!(read(&bytes, order), model);
        }

        #[test]
        fn a_range_of_any_width_changes_as_one_by_one(
            order in 0u32..=6,
            values in proptest::collection::vec(any::<u64>(), LEN),
            first in 0..LEN,
            count in 1..LEN,
            up in any::<bool>(),
        ) {
            let range = first..(first + count).min(LEN);
            let most = most(order);
            // What stays within the width when it is changed.
            let fit = |v: &u64| if up { (v & most).min(most - 1) } else { (v & most).max(1) };
            let mut model: Vec<u64> = values.iter().map(fit).collect();
            let mut bytes = block(order, &model);
            let least = model[range.clone()].iter().min().unwrap();
            let largest = model[range.clone()].iter().max().unwrap();
            prop_assert_eq!(bounds(&bytes, &range, order), (*least, *largest));
            let at = model[range.clone()].iter().position(|v| v == largest).unwrap();
            prop_assert_eq!(find(&bytes, &range, order, *largest), Some(first + at));
            step(&mut bytes, &range, order, if up { Step::Up } else { Step::Down });
            for value in &mut model[range] {
                *value = if up { *value + 1 } else { *value - 1 };
            }
            prop_assert_eq!(read(&bytes, order), model);
        }
    }
}
