//! What the guest has written since its last checkpoint.

use snapshot::{PageSet, Tracker};

use super::{Error, Machine};
use crate::memory::dirty_log::Protect;

impl Machine {
    /// Lets KVM log what the guest writes, from now on, unless the user does not want it.
    pub fn start_tracking(&mut self) -> Result<(), Error> {
        if self.spec.dirty_tracking {
            self.log.start(&self.vm, &self.memory)?;
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

    /// Whether a guest that goes back again and again writes faster to parts of RAM that are not logged.
    pub fn unlogging_helps(&self) -> bool {
        // Where KVM forgets nothing, pages are mapped already. And what is missing is to come on fault,
        // page by page.
        !self.nested_paging && self.missing.is_none()
    }

    /// The parts of RAM that are not logged while the rest is: they always count as written.
    pub fn unlogged(&self) -> &PageSet {
        self.log.untold()
    }

    /// What may differ from the base, up to the last [`Machine::note_written`].
    pub fn dirty(&self) -> &PageSet {
        self.tracker.dirty()
    }

    /// What was written since which checkpoint. It is right up to the last
    /// [`Machine::note_written`].
    pub fn tracker(&mut self) -> &mut Tracker {
        &mut self.tracker
    }
}
