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

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::{Error, Result};

#[derive(Debug)]
struct State {
    /// Images whose change is not durable.
    left: usize,
    /// Who wanted to make them so has failed with one.
    failed: bool,
}

/// A group of images that change together; see the module.
#[derive(Debug)]
pub struct Together {
    state: Mutex<State>,
    changed: Condvar,
}

impl Together {
    /// So many images are about to change.
    pub fn new(images: usize) -> Arc<Self> {
        let state = Mutex::new(State { left: images, failed: false });
        Arc::new(Self { state, changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One image more is durably changed, or will never be. Once for each.
    pub fn settled(&self) {
        let mut state = self.state();
        state.left = state.left.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// One could not be changed durably. It may be with a later flush of it; until then nobody waits for it.
    pub fn failed(&self) {
        self.state().failed = true;
        self.changed.notify_all();
    }

    /// Whether all are durably changed.
    #[cfg(test)]
    fn is_settled(&self) -> bool {
        self.state().left == 0
    }

    /// Waits until all are durably changed.
    ///
    /// # Errors
    /// One could not be.
    pub fn wait(&self) -> Result<()> {
        let state = self.state();
        let under_way = |state: &mut State| state.left > 0 && !state.failed;
        let state =
            self.changed.wait_while(state, under_way).unwrap_or_else(PoisonError::into_inner);
        if state.left == 0 {
            return Ok(());
        }
        Err(Error::Apart)
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
}
