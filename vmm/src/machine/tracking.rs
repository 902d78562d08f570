//! What the guest has written since its last checkpoint.

use snapshot::Tracker;

use super::{Error, Machine};
use crate::memory;
use crate::memory::dirty_log::Protect;

impl Machine {
    /// Lets KVM log what the guest writes, from now on, unless the user does not want it.
    pub fn start_tracking(&mut self) -> Result<(), Error> {
        if self.spec.dirty_tracking {
            memory::start_log(&self.vm, &self.memory, &mut self.log)?;
        }
        Ok(())
    }

    /// Whether what the guest writes is tracked, so that there can be a base.
    pub fn is_tracking(&self) -> bool {
        self.log.is_on()
    }

    /// Tells the tracker of all pages written so far.
    ///
    /// # Errors
    /// KVM does not say what was written. There is no base then.
    pub fn note_written(&mut self, protect: Protect) -> Result<(), Error> {
        self.written.clear();
        match self.log.collect(&self.vm, &self.memory, protect, &mut self.written) {
            Ok(()) => {
                self.tracker.note(&self.written);
                Ok(())
            }
            Err(error) => {
                self.tracker.forget();
                Err(error.into())
            }
        }
    }

    /// What was written since which checkpoint. It is right up to the last
    /// [`Machine::note_written`].
    pub fn tracker(&mut self) -> &mut Tracker {
        &mut self.tracker
    }
}
