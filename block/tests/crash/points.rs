//! The images that a crash could leave of a log.

use crate::common::Random;
use crate::pages::Pages;
use crate::record::{Change, Entry};
use crate::timeline::SECTOR;
use crate::workload::random_of;

/// Up to so many entries since the last flush all their subsets are tried.
const ALL_SUBSETS: usize = 4;
/// Of more entries each is left out once and is alone once, up to so many of them.
const SINGLES: usize = 24;
const RANDOM_SUBSETS: usize = 6;
const TORN: usize = 8;

/// One image that a crash may leave.
pub(crate) struct Point<'a> {
    /// The host stopped before this entry of the log.
    pub(crate) cut: usize,
    /// 0 is the prefix of the log, others are parts of what was not flushed.
    pub(crate) variant: usize,
    pub(crate) files: &'a [Pages],
}

/// Goes over the crash points of a log; `look` says whether to go on.
pub(crate) fn each_point(
    files: &[Pages],
    log: &[Entry],
    seed: u64,
    mut look: impl FnMut(Point<'_>) -> bool,
) {
    // What is durable, and everything.
    let mut flushed = files.to_vec();
    let mut now = files.to_vec();
    let mut pending: Vec<usize> = Vec::new();
    for cut in 0..=log.len() {
        // The prefix. After a flush it is the same as before it.
        let changed = cut == 0 || !matches!(log[cut - 1].change, Change::Flush);
        if changed && !look(Point { cut, variant: 0, files: &now }) {
            return;
        }
        let ends = log.get(cut).is_none_or(|entry| matches!(entry.change, Change::Flush));
        if ends && !pending.is_empty() {
            let mut random = random_of(seed ^ (cut as u64) << 32);
            let parts = parts(log, &pending, &mut random);
            for (n, part) in parts.iter().enumerate() {
                let mut files = flushed.clone();
                for (index, tear) in part {
                    apply(&mut files, &log[*index], tear.as_deref());
                }
                if !look(Point { cut, variant: n + 1, files: &files }) {
                    return;
                }
            }
        }
        let Some(entry) = log.get(cut) else { return };
        if matches!(entry.change, Change::Flush) {
            for index in pending.extract_if(.., |index| log[*index].file == entry.file) {
                apply(&mut flushed, &log[index], None);
            }
        } else {
            apply(&mut now, entry, None);
            pending.push(cut);
        }
    }
}

/// Applies an entry, or only the sectors of it that are wanted.
fn apply(files: &mut [Pages], entry: &Entry, sectors: Option<&[bool]>) {
    let pages = &mut files[entry.file];
    let (Some(sectors), Some((start, len))) = (sectors, entry.change.span()) else {
        return entry.change.apply(pages);
    };
    let mut at = start;
    for wanted in sectors {
        let n = (SECTOR - at % SECTOR).min(start + len - at);
        if *wanted {
            entry.change.apply_part(pages, at, n);
        }
        at += n;
    }
}

/// How many sectors an entry touches.
fn sectors(entry: &Entry) -> usize {
    entry.change.span().map_or(0, |(at, len)| (at % SECTOR + len).div_ceil(SECTOR))
}

/// An entry of the log, perhaps with only some of its sectors.
type Part = (usize, Option<Vec<bool>>);

/// Parts of what was not flushed, never all of it.
fn parts(log: &[Entry], pending: &[usize], random: &mut Random) -> Vec<Vec<Part>> {
    let whole = |wanted: &dyn Fn(usize) -> bool| -> Vec<Part> {
        let chosen = pending.iter().enumerate().filter(|(n, _)| wanted(*n));
        chosen.map(|(_, index)| (*index, None)).collect()
    };
    let count = pending.len();
    let mut all = Vec::new();
    if count <= ALL_SUBSETS {
        all.extend((0..(1 << count) - 1).map(|bits| whole(&|n| bits >> n & 1 != 0)));
    } else {
        all.push(Vec::new());
        let every = count.div_ceil(SINGLES);
        for one in (0..count).step_by(every) {
            all.push(whole(&|n| n == one));
            all.push(whole(&|n| n != one));
        }
        for _ in 0..RANDOM_SUBSETS {
            let odds = [10, 50, 90][random.below(3) as usize];
            let chosen: Vec<bool> = (0..count).map(|_| random.below(100) < odds).collect();
            all.push(whole(&|n| chosen[n]));
        }
    }
    let tearable: Vec<usize> = (0..count).filter(|n| sectors(&log[pending[*n]]) > 1).collect();
    for _ in 0..TORN.min(tearable.len() * 3) {
        let torn = tearable[random.below(tearable.len() as u64) as usize];
        let tears = tear(random, sectors(&log[pending[torn]]));
        // Alone, with all before it, or with all others.
        let with = random.below(3);
        let mut part = whole(&|n| n == torn || (n < torn && with > 0) || with == 2);
        for (index, tear) in &mut part {
            if *index == pending[torn] {
                *tear = Some(tears.clone());
            }
        }
        all.push(part);
    }
    if !tearable.is_empty() {
        let mut part = whole(&|_| true);
        for (index, torn) in &mut part {
            let count = sectors(&log[*index]);
            *torn = (count > 0).then(|| tear(random, count));
        }
        all.push(part);
    }
    all
}

/// Which sectors of a write reached the disk: the first ones, the last ones, or any.
fn tear(random: &mut Random, count: usize) -> Vec<bool> {
    let at = random.below(count as u64) as usize;
    match random.below(3) {
        0 => (0..count).map(|n| n < at).collect(),
        1 => (0..count).map(|n| n > at).collect(),
        _ => (0..count).map(|_| random.below(2) == 0).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Vec<Entry> {
        let write = |at: usize, byte: u8, len| Change::Write(at, vec![byte; len].into());
        [
            write(0, 1, 512),
            write(512, 2, 1024),
            Change::Flush,
            write(0, 3, 512),
            Change::SetLen(700),
        ]
        .map(|change| Entry { file: 0, change })
        .into()
    }

    #[test]
    fn every_prefix_and_every_small_subset_is_tried_and_what_is_flushed_stays() {
        let mut prefixes = Vec::new();
        let mut subsets = Vec::new();
        each_point(&[Pages::default()], &log(), 1, |point| {
            let bytes = point.files[0].bytes();
            match point.variant {
                0 => prefixes.push((point.cut, bytes)),
                _ => subsets.push((point.cut, bytes)),
            }
            true
        });
        let cuts: Vec<_> = prefixes.iter().map(|(cut, _)| *cut).collect();
        assert_eq!(cuts, [0, 1, 2, 4, 5]);
        let full = [vec![1; 512], vec![2; 1024]].concat();
        assert_eq!(prefixes[2].1, full);
        let cut = |end: usize, first: u8| [vec![first; 512], vec![2; end - 512]].concat();
        assert_eq!(prefixes[4].1, cut(700, 3));
        let of = |at| subsets.iter().filter(move |(cut, _)| *cut == at).map(|(_, b)| b.clone());
        for wanted in [vec![], vec![1; 512], [vec![0; 512], vec![2; 1024]].concat()] {
            assert!(of(2).any(|b| b == wanted));
        }
        // A torn second write.
        assert!(of(2).any(|b| b.get(512) == Some(&2) && b.get(1024) != Some(&2)));
        assert!(of(2).any(|b| b.get(512) == Some(&0) && b.get(1024) == Some(&2)));
        let late: Vec<_> = of(5).collect();
        assert_eq!(late, [full.clone(), cut(1536, 3), cut(700, 1)]);
    }
}
