//! Where the bytes of a request are, told by a format without waiting.

use std::sync::Arc;

use crate::node::Access;
use crate::qcow2::{Held, Target};
use crate::storage::Storage;

/// Where a part of a request is.
#[derive(Debug)]
pub(crate) enum Place {
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In a storage from an offset on. A write there has zeroes before and behind the request's
    /// bytes, as many as told.
    Storage {
        /// Which.
        storage: Arc<dyn Storage>,
        /// Of the request's first byte.
        offset: u64,
        /// Zeroes to be written before it.
        before: u64,
        /// Zeroes to be written behind its last.
        behind: u64,
    },
}

/// A part of a request whose bytes are in a row.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) len: u64,
    pub(crate) place: Place,
}

/// Where all of a request is, with the right to transfer it: the guest ranges are held until this is
/// cleared.
#[derive(Debug, Default)]
pub struct Located {
    pub(crate) extents: Vec<Extent>,
    pub(crate) held: Vec<Held>,
    /// New places that [`crate::Format::finish_write`] puts into the tables.
    pub(crate) targets: Vec<Target>,
    /// The request was not located because another is in the way.
    pub(crate) conflict: bool,
    /// The backing images that the places are in stay what they are meanwhile. The last to go: who
    /// waits for them may close the files.
    pub(crate) entered: Vec<Access>,
}

impl Located {
    /// Gives up the right, and is empty.
    pub(crate) fn clear(&mut self) {
        self.extents.clear();
        self.targets.clear();
        self.held.clear();
        self.conflict = false;
        self.entered.clear();
    }

    /// Adds a part that is in a storage.
    pub(crate) fn push_storage(&mut self, storage: &Arc<dyn Storage>, offset: u64, len: u64) {
        let storage = storage.clone();
        self.extents
            .push(Extent { len, place: Place::Storage { storage, offset, before: 0, behind: 0 } });
    }

    /// Adds a part that reads as zeroes.
    pub(crate) fn push_zero(&mut self, len: u64) {
        if len > 0 {
            self.extents.push(Extent { len, place: Place::Zero });
        }
    }
}
