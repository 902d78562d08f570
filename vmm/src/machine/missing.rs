//! Guest RAM that is still in a checkpoint's image.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::Presence;
use snapshot::{Checkpoint, LazyRam, LoadError, Notice, Notify};

use super::{Error, Machine};
use crate::control::mailbox::{Mailbox, Message};

/// The missing part of RAM after a lazy load.
pub struct Missing {
    /// Another number for each load: what an earlier one still had to tell is nobody's concern.
    id: u64,
    /// The checkpoint's tag.
    pub tag: String,
    /// Name of the node that holds its RAM.
    pub node: String,
    /// The service.
    pub ram: LazyRam,
}

impl Missing {
    /// Has RAM read from `checkpoint` when it is touched, as `lend` does; the machine must be paused.
    ///
    /// # Errors
    /// As `lend`.
    pub fn lend(
        checkpoint: &Checkpoint,
        presence: &Presence,
        mailbox: &Mailbox,
        lend: impl FnOnce(Notify) -> Result<LazyRam, LoadError>,
    ) -> Result<Arc<Self>, LoadError> {
        static LOADS: AtomicU64 = AtomicU64::new(0);
        let id = LOADS.fetch_add(1, Ordering::Relaxed);
        presence.set_missing();
        let (theirs, mailbox) = (presence.clone(), mailbox.clone());
        let notify = move |notice: Notice| {
            match notice {
                // Before the page can be taken for what it is not.
                Notice::Lost => theirs.set_lost(),
                Notice::Complete | Notice::Failing(_) => {}
            }
            mailbox.send(Message::Missing { id, notice });
        };
        let ram = lend(Box::new(notify))?;
        let tag = checkpoint.info().tag.clone();
        Ok(Arc::new(Self { id, tag, node: checkpoint.vmstate_node().to_owned(), ram }))
    }

    /// Which load it is of.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Machine {
    /// The part of RAM that is still in an image, if any is.
    pub fn missing(&self) -> Option<&Arc<Missing>> {
        self.missing.as_ref()
    }

    /// RAM is that of a lazy load, whose vCPUs and devices have been restored.
    ///
    /// # Errors
    /// A page that was needed for that could not be read.
    pub fn set_missing(&mut self, missing: Arc<Missing>) -> Result<(), Error> {
        if let Some(reason) = missing.ram.lost() {
            return Err(Error::Lost(reason));
        }
        missing.ram.restored();
        self.missing = Some(missing);
        Ok(())
    }

    /// Nothing is missing any more, or what is does not matter: it is zero from now on.
    pub fn forget_missing(&mut self) {
        if let Some(missing) = self.missing.take() {
            missing.ram.abandon();
        }
        self.devices.presence().set_whole();
    }
}
