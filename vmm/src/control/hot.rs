//! Hot parts of RAM: those whose pages are written again between every two rewinds.

use snapshot::{PageRun, PageSet};

use crate::memory::dirty_log::Protect;

/// Loads for which pages that were written once are left unprotected.
const UNPROTECTED: u32 = 16;
/// Pages of a part of RAM that may be hot: what the host and KVM can map at once.
const PART: u64 = 512;
/// Written pages that make it so. A fault takes as long as putting back some 12 pages.
const WRITTEN: u64 = 64;
/// Most parts that are hot, which is 32 MiB that each load puts back.
const MOST_PARTS: u64 = 16;
/// Loads after which hot parts are looked at again.
const HOT_FOR: u32 = 2048;

/// Whoever goes back again and again writes to the same pages each time. A fault for each of them costs
/// more than putting back a page that was not written, so they are left unprotected for a while: they
/// count as written each time. Which they are is found out anew after so many loads, or when they have
/// become twice as many.
///
/// Where KVM forgets all it has mapped at each rewind that helps little: each page is a fault all the
/// same. There, parts of RAM are *hot* in which many pages are written in two runs that are apart. They
/// are not logged, so that KVM maps many pages at once; all of their pages are put back.
#[derive(Debug, Default)]
pub(super) struct Hot {
    /// Loads until pages are protected again.
    left: u32,
    /// Pages of the first load since.
    pages: Option<u64>,
    /// The parts with many pages in the last run of which exactly the written pages are known.
    before: Option<PageSet>,
    /// Loads since the first part became hot.
    age: u32,
}

impl Hot {
    /// What is to become of the pages that were written up to the load that begins.
    pub(super) fn protect(&mut self) -> Protect {
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Protect::Not
            }
            None => {
                self.left = UNPROTECTED;
                self.pages = None;
                Protect::Again
            }
        }
    }

    /// These pages counted as written, those in `hot` parts among them. Gives the parts that are to be hot
    /// from now on, if others.
    pub(super) fn note(
        &mut self,
        protect: Protect,
        written: &PageSet,
        hot: &PageSet,
    ) -> Option<PageSet> {
        // Those of a load that protects are of former runs too, those of later ones of all runs since.
        let pages = written.count();
        let exact = protect == Protect::Not && self.pages.is_none();
        if protect == Protect::Not && pages > 2 * *self.pages.get_or_insert(pages) {
            self.left = 0;
        }
        if hot.is_empty() {
            self.age = 0;
        } else {
            self.age += 1;
            if self.age >= HOT_FOR {
                *self = Self::default();
                return Some(hot.empty_like());
            }
        }
        if exact { self.hotter(parts(written, hot), hot) } else { None }
    }

    /// `many`: parts that many pages of were written in one run, not hot yet.
    fn hotter(&mut self, many: PageSet, hot: &PageSet) -> Option<PageSet> {
        let mut again = many.clone();
        again.intersect(&self.before.replace(many)?);
        let room = MOST_PARTS.saturating_sub(hot.count() / PART);
        let mut hotter = hot.clone();
        for part in again.runs().flat_map(|run| run.pieces(PART)).take(count(room)) {
            hotter.insert(part);
        }
        (hotter != *hot).then_some(hotter)
    }
}

/// The parts of which many pages were written, but for those that are hot.
fn parts(written: &PageSet, hot: &PageSet) -> PageSet {
    let mut many = written.empty_like();
    let groups = written.in_groups(PART);
    let parts = groups.runs().flat_map(|run: PageRun| run.pieces(PART));
    for part in parts.filter(|part| !hot.contains_any(*part)) {
        if written.count_in(part) >= WRITTEN {
            many.insert(part);
        }
    }
    many
}

fn count(parts: u64) -> usize {
    usize::try_from(parts).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGIONS: [u64; 2] = [512 * 40, 1000];

    fn set(runs: &[(usize, u64, u64)]) -> PageSet {
        let mut set = PageSet::empty(REGIONS);
        for &(region, first, count) in runs {
            set.insert(PageRun { region, first, count });
        }
        set
    }

    /// Loads with a guest that writes `runs` each time, until the hot parts are others; at most `most`.
    fn until_changed(
        hot: &mut Hot,
        runs: &[(usize, u64, u64)],
        now: &PageSet,
        most: u32,
    ) -> Option<(u32, PageSet)> {
        let mut written = set(runs);
        written.union(now);
        (1..=most).find_map(|load| {
            let protect = hot.protect();
            Some((load, hot.note(protect, &written, now)?))
        })
    }

    #[test]
    fn a_part_written_in_two_runs_that_are_apart_becomes_hot() {
        let mut hot = Hot::default();
        let runs = [(0, 512 * 3 + 100, 256), (0, 7, 1)];
        let found = until_changed(&mut hot, &runs, &set(&[]), 100);
        // The first run that is known exactly is that of the second load, the next that of the 19th.
        assert_eq!(found, Some((2 + UNPROTECTED + 1, set(&[(0, 512 * 3, 512)]))));
    }

    #[test]
    fn few_pages_in_each_part_make_none_hot() {
        let mut hot = Hot::default();
        let runs: Vec<_> = (0..40).map(|part| (0, 512 * part, WRITTEN - 1)).collect();
        assert_eq!(until_changed(&mut hot, &runs, &set(&[]), 1000), None);
        let found = until_changed(&mut hot, &[(0, 0, WRITTEN)], &set(&[]), 1000);
        assert_eq!(found.map(|(_, parts)| parts), Some(set(&[(0, 0, 512)])));
    }

    #[test]
    fn a_part_that_is_written_once_does_not_become_hot() {
        let mut hot = Hot::default();
        let none = set(&[]);
        for load in 0..1000 {
            let protect = hot.protect();
            // Another part each time, and what counts as written grows while pages are unprotected.
            let written = set(&[(0, 0, 512 * (1 + load % 2))]);
            let written = if protect == Protect::Not && hot.pages.is_none() {
                set(&[(0, 512 * (load / 17 % 2), 512)])
            } else {
                written
            };
            assert_eq!(hot.note(protect, &written, &none), None, "load {load}");
        }
    }

    #[test]
    fn more_parts_become_hot_up_to_the_most_and_what_is_at_the_end_of_a_region() {
        let mut hot = Hot::default();
        let first = [(1, 512, 488)];
        let (_, one) = until_changed(&mut hot, &first, &set(&[]), 100).unwrap();
        assert_eq!(one, set(&first));
        let all = [(0, 0, 512 * 40), (1, 0, 1000)];
        let (_, most) = until_changed(&mut hot, &all, &one, 100).unwrap();
        // Those hot before, and the first others.
        let mut expected = set(&[(0, 0, 512 * MOST_PARTS)]);
        expected.union(&one);
        assert_eq!(most, expected);
        // No more after that, but all are looked at again in the end.
        let found = until_changed(&mut hot, &all, &most, HOT_FOR);
        assert_eq!(found.map(|(_, parts)| parts), Some(set(&[])));
    }

    #[test]
    fn hot_parts_are_found_anew_after_a_time() {
        let mut hot = Hot::default();
        let runs = [(0, 512, 512)];
        let (_, one) = until_changed(&mut hot, &runs, &set(&[]), 100).unwrap();
        assert_eq!(until_changed(&mut hot, &runs, &one, 5000), Some((HOT_FOR, set(&[]))));
        let again = until_changed(&mut hot, &runs, &set(&[]), 100);
        assert_eq!(again, Some((2 + UNPROTECTED + 1, one)));
    }

    #[test]
    fn twice_as_many_pages_are_protected_again() {
        let mut hot = Hot::default();
        let none = set(&[]);
        assert_eq!(hot.protect(), Protect::Again);
        hot.note(Protect::Again, &set(&[(0, 0, 512)]), &none);
        for (pages, next) in [(10, Protect::Not), (20, Protect::Not), (21, Protect::Again)] {
            assert_eq!(hot.protect(), Protect::Not);
            hot.note(Protect::Not, &set(&[(0, 0, pages)]), &none);
            assert_eq!(hot.left == 0, next == Protect::Again, "{pages}");
        }
        assert_eq!(hot.protect(), Protect::Again);
    }
}
