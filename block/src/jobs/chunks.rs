//! Which parts of a disk are still to be copied, and which are being copied.
//!
//! ```text
//!   clean ──mark──> to do ──claim──> at work ──finish(done)──> clean
//!                     ^                 │ not done
//!                     └─────────────────┘          mark at any time: it is to do once more
//! ```
//!
//! A part that is at work is nobody else's. One that is seized is at work for a change that will say
//! itself what is to do about it. The lock is held for memory only.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::bitmap::Bits;

#[derive(Debug)]
struct State {
    todo: Bits,
    work: Bits,
    /// Parts of `work` that changes have.
    seized: Bits,
    /// Where the next piece is looked for.
    cursor: u64,
    waiting: usize,
}

/// A disk in chunks. Ranges are in bytes.
#[derive(Debug)]
pub(super) struct Chunks {
    /// Bytes of a chunk.
    unit: u64,
    size: u64,
    state: Mutex<State>,
    finished: Condvar,
}

impl Chunks {
    /// Of a disk of `size` bytes, all clean.
    pub(super) fn new(size: u64, unit: u64) -> Self {
        let count = size.div_ceil(unit);
        let bits = || Bits::new(count);
        let state = State { todo: bits(), work: bits(), seized: bits(), cursor: 0, waiting: 0 };
        Self { unit, size, state: Mutex::new(state), finished: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn unit(&self) -> u64 {
        self.unit
    }

    /// The chunks that a range touches.
    fn touched(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.size);
        bytes.start.min(end) / self.unit..end.div_ceil(self.unit)
    }

    fn bytes(&self, chunks: &Range<u64>) -> Range<u64> {
        chunks.start * self.unit..(chunks.end * self.unit).min(self.size)
    }

    /// The part of a range that is made of whole chunks; the disk's end counts as the end of one.
    fn covered(&self, bytes: &Range<u64>) -> Range<u64> {
        let end =
            if bytes.end >= self.size { self.size } else { bytes.end - bytes.end % self.unit };
        let start = bytes.start.next_multiple_of(self.unit);
        start.min(end)..end
    }

    /// Has what a range touches copied, once more if it is at work. Says whether nothing was to do before.
    pub(super) fn mark(&self, bytes: Range<u64>) -> bool {
        let chunks = self.touched(&bytes);
        let mut state = self.state();
        let none = state.todo.count() == 0;
        state.todo.set(chunks);
        none
    }

    /// As [`Chunks::mark`], without what is seized.
    pub(super) fn mark_unseized(&self, bytes: Range<u64>) -> bool {
        let chunks = self.touched(&bytes);
        let mut state = self.state();
        let none = state.todo.count() == 0;
        let mut at = chunks.start;
        while at < chunks.end {
            let seized = state.seized.next_set(at).unwrap_or(u64::MAX).min(chunks.end);
            state.todo.set(at..seized);
            at = state.seized.next_clear(seized).max(seized);
        }
        none
    }

    /// Lets go of what was seized; what a range covers wholly is not to do any more, and all of it is
    /// if the change did not get `done`.
    pub(super) fn release(&self, seized: &Range<u64>, covered: &Range<u64>, done: bool) {
        let (chunks, covered) = (self.touched(seized), self.touched(&self.covered(covered)));
        let mut state = self.state();
        state.seized.clear(chunks.clone());
        state.work.clear(chunks.clone());
        if done {
            state.todo.clear(covered);
        } else {
            state.todo.set(chunks);
        }
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.finished.notify_all();
        }
    }

    /// Takes a range out of what is to do.
    pub(super) fn unmark(&self, bytes: &Range<u64>) {
        let chunks = self.touched(bytes);
        self.state().todo.clear(chunks);
    }

    /// Bytes to do and at work.
    pub(super) fn remaining(&self) -> u64 {
        let state = self.state();
        (state.todo.count() + state.work.count()).saturating_mul(self.unit).min(self.size)
    }

    /// Whether anything is to do.
    pub(super) fn any(&self) -> bool {
        self.state().todo.count() > 0
    }

    /// Whether nothing is to do or at work.
    pub(super) fn is_clean(&self) -> bool {
        let state = self.state();
        state.todo.count() == 0 && state.work.count() == 0
    }

    /// Takes the next piece of at most `max` bytes in hand, if any is free.
    pub(super) fn claim(&self, max: u64) -> Option<Range<u64>> {
        let most = (max / self.unit).max(1);
        let mut state = self.state();
        let from = state.cursor;
        let found = state.next_free(from).or_else(|| state.next_free(0))?;
        let end = found.end.min(found.start + most);
        let chunks = found.start..end;
        state.take(chunks.clone());
        state.cursor = chunks.end;
        Some(self.bytes(&chunks))
    }

    /// Takes in hand a piece, of at most `max` bytes, of what a range touches and is to do. Waits for
    /// what is at work there; `None` once all of it is clean.
    pub(super) fn claim_within(&self, bytes: &Range<u64>, max: u64) -> Option<Range<u64>> {
        let within = self.touched(bytes);
        let most = (max / self.unit).max(1);
        let mut state = self.state();
        loop {
            if let Some(found) = state.next_free(within.start).filter(|f| f.start < within.end) {
                let chunks = found.start..found.end.min(within.end).min(found.start + most);
                state.take(chunks.clone());
                return Some(self.bytes(&chunks));
            }
            if !state.at_work(&within) {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// Takes all of what a range touches in hand, whether it is to do or not, once nobody else has any
    /// of it. What is to do stays so.
    pub(super) fn seize(&self, bytes: &Range<u64>) -> Range<u64> {
        let within = self.touched(bytes);
        let mut state = self.state();
        while state.at_work(&within) {
            state = self.wait(state);
        }
        state.work.set(within.clone());
        state.seized.set(within.clone());
        self.bytes(&within)
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = self.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    /// Waits until some of what is to do is free: others have all of it in hand.
    pub(super) fn wait_for_free(&self) {
        let mut state = self.state();
        while state.todo.count() > 0 && state.work.count() > 0 && state.next_free(0).is_none() {
            state = self.wait(state);
        }
    }

    /// Lets go of what was taken in hand; what is not `done` is to do again.
    pub(super) fn finish(&self, bytes: &Range<u64>, done: bool) {
        let chunks = self.touched(bytes);
        let mut state = self.state();
        state.work.clear(chunks.clone());
        if !done {
            state.cursor = state.cursor.min(chunks.start);
            state.todo.set(chunks);
        }
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.finished.notify_all();
        }
    }

    /// Parts that are to do or at work, in order.
    pub(super) fn left(&self) -> Vec<Range<u64>> {
        let state = self.state();
        let mut all = state.todo.clone();
        all.merge(&state.work);
        drop(state);
        let (mut at, mut list) = (0, Vec::new());
        while let Some(first) = all.next_set(at) {
            at = all.next_clear(first);
            list.push(self.bytes(&(first..at)));
        }
        list
    }
}

impl State {
    /// The first run from `from` on of what is to do and not at work.
    fn next_free(&self, from: u64) -> Option<Range<u64>> {
        let mut at = from;
        loop {
            let first = self.todo.next_set(at)?;
            let free = match self.work.next_set(first) {
                Some(taken) if taken == first => {
                    at = self.work.next_clear(first);
                    continue;
                }
                Some(taken) => taken,
                None => u64::MAX,
            };
            return Some(first..self.todo.next_clear(first).min(free));
        }
    }

    fn take(&mut self, chunks: Range<u64>) {
        self.todo.clear(chunks.clone());
        self.work.set(chunks);
    }

    fn at_work(&self, chunks: &Range<u64>) -> bool {
        self.work.next_set(chunks.start).is_some_and(|taken| taken < chunks.end)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn pieces_are_claimed_in_order_up_to_the_disks_end_and_once() {
        let chunks = Chunks::new(1000, 100);
        assert!(chunks.mark(150..151));
        assert!(!chunks.mark(420..999));
        assert_eq!(chunks.remaining(), 700);
        assert_eq!(chunks.claim(1000), Some(100..200));
        assert_eq!(chunks.claim(250), Some(400..600));
        chunks.finish(&(400..600), false);
        assert_eq!(chunks.claim(10_000), Some(400..1000));
        assert_eq!(chunks.claim(1), None);
        assert!(!chunks.any() && !chunks.is_clean());
        assert_eq!(chunks.left(), [100..200, 400..1000]);
        chunks.finish(&(100..200), true);
        chunks.finish(&(400..1000), true);
        assert!(chunks.is_clean());
    }

    #[test]
    fn what_is_marked_while_at_work_is_claimed_after_it() {
        let chunks = Chunks::new(1000, 100);
        chunks.mark(0..300);
        assert_eq!(chunks.claim(200), Some(0..200));
        chunks.mark(100..101);
        assert_eq!(chunks.claim(1000), Some(200..300));
        assert_eq!(chunks.claim(1000), None);
        chunks.finish(&(0..200), true);
        assert_eq!(chunks.claim(1000), Some(100..200));
    }

    #[test]
    fn a_claim_within_a_range_waits_for_what_others_have_there() {
        let chunks = Chunks::new(1000, 100);
        chunks.mark(0..1000);
        assert_eq!(chunks.claim(200), Some(0..200));
        assert_eq!(chunks.claim_within(&(199..250), 1000), Some(200..300));
        chunks.finish(&(200..300), true);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| chunks.claim_within(&(199..250), 1000));
            while chunks.state().waiting == 0 {
                thread::yield_now();
            }
            // It failed there: now it is for who waited.
            chunks.finish(&(0..200), false);
            assert_eq!(waiting.join().unwrap(), Some(100..200));
        });
        chunks.finish(&(100..200), true);
        assert_eq!(chunks.claim_within(&(199..250), 1000), None);
    }

    #[test]
    fn who_seizes_a_range_waits_for_who_has_any_of_it_and_leaves_what_is_to_do() {
        let chunks = Chunks::new(1000, 100);
        chunks.mark(0..200);
        assert_eq!(chunks.claim(100), Some(0..100));
        thread::scope(|scope| {
            let seizing = scope.spawn(|| chunks.seize(&(50..101)));
            while chunks.state().waiting == 0 {
                thread::yield_now();
            }
            chunks.finish(&(0..100), true);
            assert_eq!(seizing.join().unwrap(), 0..200);
        });
        assert!(chunks.any());
        assert_eq!(chunks.claim(100), None);
        chunks.finish(&(0..200), true);
        assert_eq!(chunks.claim(1000), Some(100..200));
    }

    #[test]
    fn a_change_that_seized_its_parts_says_what_is_to_do_about_them() {
        let chunks = Chunks::new(1000, 100);
        let left = |seize: Range<u64>, done| {
            chunks.mark(200..500);
            let seized = chunks.seize(&seize);
            // The change is told to everybody, and something else is marked meanwhile.
            chunks.mark_unseized(seize.clone());
            chunks.mark_unseized(700..900);
            chunks.mark(800..801);
            chunks.release(&seized, &seize, done);
            let left = chunks.left();
            chunks.unmark(&(0..1000));
            left
        };
        assert_eq!(left(150..450, true), [400..500, 700..900]);
        assert_eq!(left(150..450, false), [100..500, 700..900]);
        assert_eq!(left(650..750, true), [200..500, 800..900]);
        assert_eq!(left(850..870, true), [200..500, 700..900]);
        assert!(chunks.is_clean());
    }

    #[test]
    fn a_range_covers_whole_chunks() {
        let chunks = Chunks::new(1050, 100);
        assert_eq!(chunks.covered(&(100..300)), 100..300);
        assert_eq!(chunks.covered(&(101..300)), 200..300);
        assert!(chunks.covered(&(101..199)).is_empty());
        assert_eq!(chunks.covered(&(950..1050)), 1000..1050);
    }
}
