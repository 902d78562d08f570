//! Images that change together, in memory first: none is durably flushed before all are durably changed.
//!
//! A guest that goes on between the change in memory and the one on disk sees all its disks changed. A flush that
//! returns tells it that what it wrote is safe, and it may rely on that for another disk too. If one disk had the
//! change after a crash and another had not, that would be wrong. So a flush of one of them returns when all have
//! the change on disk ([`Together::wait`]). A crash before any flush returned may leave some with it and some
//! without.
//!
//! Nobody who makes an image's change durable waits here, so there is no deadlock: only those wait who have done so
//! for their own image.
//!
//! Where that has failed for one, each later flush of any of them tries it again for all that are left, one flush at
//! a time: the guest may have no reason ever to flush the one that failed.
//!
//! A try has a handle of an image, takes the locks of its format and comes to no node's gate. So who holds back an
//! image's requests to put another in its place waits for it ([`Together::between_tries`]), and has the image to
//! itself once its own flush has returned: no try comes after that.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use crate::{Error, Result};

/// An image that can be told to make its change durable.
pub(crate) trait Follow: Send + Sync {
    /// As a flush of it that waits for no other image; tells of it by [`Together::followed`].
    fn follow(&self) -> Result<()>;
}

/// Names an image within its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(usize);

#[derive(Default)]
struct State {
    /// Images whose change is not durable.
    left: usize,
    /// Who wanted to make them so has failed with one.
    failed: bool,
    /// A flush is trying again.
    trying: bool,
    /// Those left that can be told to follow.
    images: BTreeMap<Place, Weak<dyn Follow>>,
    next: usize,
}

/// A group of images that change together; see the module.
pub struct Together {
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Together {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Together").field("left", &self.state().left).finish_non_exhaustive()
    }
}

impl Together {
    /// So many images are about to change.
    pub fn new(images: usize) -> Arc<Self> {
        let state = Mutex::new(State { left: images, ..State::default() });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a flush of another image try again for this one, as long as it is there and has not followed.
    pub(crate) fn join(&self, image: Weak<dyn Follow>) -> Place {
        let mut state = self.state();
        let place = Place(state.next);
        state.next += 1;
        state.images.insert(place, image);
        place
    }

    /// One that has joined is durably changed, or will never be. Once for each.
    pub(crate) fn followed(&self, place: Place) {
        self.state().images.remove(&place);
        self.settled();
    }

    /// One that has not joined is durably changed, or will never be. Once for each.
    pub fn settled(&self) {
        let mut state = self.state();
        state.left = state.left.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// One could not be changed durably. It may be with a later flush of any; until then nobody waits for it.
    pub fn failed(&self) {
        self.state().failed = true;
        self.changed.notify_all();
    }

    /// Whether all are durably changed.
    #[cfg(test)]
    fn is_settled(&self) -> bool {
        self.state().left == 0
    }

    /// Waits until all are durably changed, and tries again for those that could not be.
    ///
    /// # Errors
    /// One could not be, now neither.
    pub fn wait(&self) -> Result<()> {
        let state = self.state();
        // A try that goes on may still have handles of those that have followed.
        let under_way = |state: &mut State| state.trying || (state.left > 0 && !state.failed);
        let mut state =
            self.changed.wait_while(state, under_way).unwrap_or_else(PoisonError::into_inner);
        if state.left == 0 {
            return Ok(());
        }
        state.trying = true;
        let images: Vec<_> = state.images.values().cloned().collect();
        drop(state);
        for image in images.iter().filter_map(Weak::upgrade) {
            if let Err(error) = image.follow() {
                // The job has told it; a guest may flush as often as it likes.
                tracing::debug!("an image is not at the snapshot on disk yet: {error}");
            }
        }
        let mut state = self.state();
        state.trying = false;
        let left = state.left;
        drop(state);
        self.changed.notify_all();
        if left == 0 { Ok(()) } else { Err(Error::Apart) }
    }

    /// Calls `look` while no flush is trying again, hence none has a handle of an image; waits for one that is.
    pub(crate) fn between_tries<T>(&self, look: impl FnOnce() -> T) -> T {
        let trying = |state: &mut State| state.trying;
        let _state =
            self.changed.wait_while(self.state(), trying).unwrap_or_else(PoisonError::into_inner);
        look()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_the_last_is_settled_and_fails_while_one_has_failed() {
        let together = Together::new(2);
        together.settled();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| together.wait());
            assert!(!together.is_settled());
            together.failed();
            assert!(matches!(waiting.join().unwrap(), Err(Error::Apart)));
        });
        assert!(together.wait().is_err());
        together.settled();
        together.wait().unwrap();

        let together = Together::new(1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| together.wait());
            together.settled();
            waiting.join().unwrap().unwrap();
        });
    }

    /// Follows at the third try.
    struct Slow(Arc<Together>, Mutex<u32>, Place);

    impl Follow for Slow {
        fn follow(&self) -> Result<()> {
            let mut tries = self.1.lock().unwrap();
            *tries += 1;
            if *tries < 3 {
                return Err(Error::Apart);
            }
            self.0.followed(self.2);
            Ok(())
        }
    }

    #[test]
    fn each_flush_after_a_failure_tries_again_for_an_image_that_is_there() {
        let together = Together::new(1);
        let slow = Arc::new_cyclic(|slow: &Weak<Slow>| {
            let place = together.join(slow.clone());
            Slow(together.clone(), Mutex::default(), place)
        });
        together.failed();
        let results: Vec<_> = (0..3).map(|_| together.wait().is_ok()).collect();
        assert_eq!(results, [false, false, true]);
        assert_eq!(*slow.1.lock().unwrap(), 3);

        let together = Together::new(1);
        let gone: Weak<Slow> = Arc::downgrade(&slow);
        drop(slow);
        together.join(gone);
        together.failed();
        assert!(together.wait().is_err(), "nobody is there who could follow");
    }
}
