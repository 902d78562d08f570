//! Whether to look for the next request for a while before sleeping.
//!
//! A client that waits for each reply sends again at once: sleeping and waking would take longer than
//! its request. Looking that finds nothing is wasted, so after each such time the next ones sleep at
//! once, twice as often as before: a connection that is idle, or whose requests come now and then,
//! costs next to nothing. One success makes up for all failures, so a burst is noticed at once.

use std::time::Duration;

/// Longest look: more than a client takes that sleeps until the reply comes.
pub(super) const LONGEST: Duration = Duration::from_micros(50);
/// At most 2 to the power of this are slept through after a failure.
const MAX_MISSES: u32 = 10;

/// Decides whether to look before sleeping, by how often that helped.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Looks in a row that found nothing.
    misses: u32,
    /// Waits to come that sleep at once.
    skip: u32,
}

impl Look {
    /// Whether to look in the wait that begins.
    pub(super) fn wanted(&mut self) -> bool {
        let wanted = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        wanted
    }

    /// A look found something, or nothing.
    pub(super) fn ended(&mut self, found: bool) {
        if found {
            self.misses = 0;
        } else {
            self.misses = (self.misses + 1).min(MAX_MISSES);
            self.skip = (1 << self.misses) - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many waits look, where each look finds or does not find something.
    fn looks(look: &mut Look, waits: u32, found: bool) -> u32 {
        let mut count = 0;
        for _ in 0..waits {
            if look.wanted() {
                count += 1;
                look.ended(found);
            }
        }
        count
    }

    #[test]
    fn looks_that_find_nothing_become_rare_and_go_on_being_tried() {
        let mut look = Look::default();
        assert_eq!(looks(&mut look, 2047, false), 11);
        assert_eq!(looks(&mut look, 10 << MAX_MISSES, false), 10);
    }

    #[test]
    fn every_wait_looks_once_one_look_found_something() {
        let mut look = Look::default();
        looks(&mut look, 5000, false);
        let asleep = (0..=1 << MAX_MISSES).take_while(|_| !look.wanted()).count();
        assert!(asleep < 1 << MAX_MISSES);
        look.ended(true);
        assert_eq!(looks(&mut look, 100, true), 100);
        // A pause of the client costs one look and one sleep.
        look.ended(false);
        assert_eq!([look.wanted(), look.wanted()], [false, true]);
    }
}
