//! A small pool of threads for one operation, whose own thread hands out the pieces.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};

use super::Control;
use super::copy::{Failed, Kind};

/// Pieces under way at once: enough to keep a disk busy while others are read.
pub(super) const PARALLEL: usize = 4;

/// For the operation's thread.
pub(super) struct Crew<'a, P, R> {
    work: &'a (dyn Fn(P) -> R + Sync),
    pieces: Sender<P>,
    results: Receiver<R>,
    done: Sender<R>,
    threads: usize,
    under_way: usize,
}

/// Has `lead` hand out pieces that `work` does on other threads. All are done when this returns.
pub(super) fn with_crew<P: Send, R: Send, T>(
    work: &(impl Fn(P) -> R + Sync),
    lead: impl FnOnce(&mut Crew<'_, P, R>) -> T,
) -> T {
    let (pieces, queue) = channel();
    let (done, results) = channel();
    let queue = Mutex::new(queue);
    thread::scope(|scope| {
        let threads = start(scope, work, &queue, &done);
        let mut crew = Crew { work, pieces, results, done, threads: threads.len(), under_way: 0 };
        // Threads end with the crew, which has the sender.
        lead(&mut crew)
    })
}

fn start<'scope, P: Send + 'scope, R: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: &'scope (impl Fn(P) -> R + Sync),
    queue: &'scope Mutex<Receiver<P>>,
    done: &Sender<R>,
) -> Vec<ScopedJoinHandle<'scope, ()>> {
    let one = |_| {
        let done = done.clone();
        let serve = move || {
            loop {
                let piece = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(piece) = piece else { return };
                if done.send(work(piece)).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("block-job".to_owned());
        thread.spawn_scoped(scope, serve).inspect_err(|e| tracing::warn!("no thread: {e}")).ok()
    };
    (0..PARALLEL).map_while(one).collect()
}

impl<P, R> Crew<'_, P, R> {
    /// Whether another piece can be given without waiting for one.
    pub(super) fn has_room(&self) -> bool {
        self.under_way < self.threads.max(1)
    }

    /// Has a piece done.
    pub(super) fn give(&mut self, piece: P) {
        self.under_way += 1;
        if self.threads == 0 {
            // A host out of threads: one after another then. The receiver is ours, so it takes it.
            let _ = self.done.send((self.work)(piece));
        } else {
            // The threads end only with the sender.
            let _ = self.pieces.send(piece);
        }
    }

    /// Waits for the next piece that is done; `None` if none is under way.
    pub(super) fn next(&mut self) -> Option<R> {
        if self.under_way == 0 {
            return None;
        }
        self.under_way -= 1;
        self.results.recv().ok()
    }
}

impl<P, E> Crew<'_, P, Result<(), E>> {
    /// Waits until no piece is under way; gives the first failure of these.
    pub(super) fn drain(&mut self) -> Option<E> {
        let mut failure = None;
        while let Some(result) = self.next() {
            failure = failure.or(result.err());
        }
        failure
    }
}

/// Those who copy pieces.
pub(super) type Copiers<'a> = Crew<'a, (Range<u64>, Kind), Result<(), Failed>>;

/// How handing out goes on.
pub(super) enum Turn {
    /// A piece was handed out, or one came back.
    Next,
    /// There is no piece, and none is under way.
    Nothing,
    /// The job is to rest; first it tells of what is wrong.
    Rest(Option<Failed>),
}

impl Copiers<'_> {
    /// Hands out a piece as fast as the job may, or waits for one that is under way.
    pub(super) fn hand_out(
        &mut self,
        control: &Control,
        next: impl FnOnce() -> Result<Option<(Range<u64>, Kind)>, Failed>,
    ) -> Turn {
        // Before a piece is taken in hand: writes of it would wait for the speed, too.
        if !control.pace(0) {
            return Turn::Rest(None);
        }
        match if self.has_room() { next() } else { Ok(None) } {
            Ok(Some((range, kind))) => {
                if kind == Kind::Data {
                    control.spend(range.end - range.start);
                }
                self.give((range, kind));
                Turn::Next
            }
            Ok(None) => match self.next() {
                None => Turn::Nothing,
                Some(Ok(())) => Turn::Next,
                Some(Err(failed)) => Turn::Rest(Some(failed)),
            },
            Err(failed) => Turn::Rest(Some(failed)),
        }
    }

    /// Has the job rest, or fail, once nothing is under way.
    pub(super) fn rest(
        &mut self,
        control: &Control,
        wrong: Option<Failed>,
        failed: impl FnOnce(Failed) -> crate::Result<()>,
    ) -> crate::Result<()> {
        let also_wrong = self.drain();
        wrong.or(also_wrong).map_or_else(|| control.rest(), failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_done_beside_each_other_and_all_are_told() {
        let both = std::sync::Barrier::new(2);
        let work = |n: u32| {
            both.wait();
            n * 2
        };
        let mut seen = with_crew(&work, |crew| {
            assert!(crew.next().is_none());
            let mut seen = Vec::new();
            for n in 0..20 {
                while !crew.has_room() {
                    seen.extend(crew.next());
                }
                crew.give(n);
            }
            seen.extend(std::iter::from_fn(|| crew.next()));
            seen
        });
        seen.sort_unstable();
        assert_eq!(seen, (0..20).map(|n| n * 2).collect::<Vec<_>>());
    }
}
