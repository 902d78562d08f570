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
