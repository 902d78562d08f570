//! Reporting damage that is found while an image is in use.

use std::fmt::{self, Debug, Formatter};
use std::sync::{Mutex, PoisonError};

/// Damage that was found (QMP: `BLOCK_IMAGE_CORRUPTED`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corruption {
    /// What is wrong, QMP's `msg`.
    pub reason: String,
    /// Host offset in bytes of the write that was prevented, where it was one.
    pub offset: Option<u64>,
    /// Its length in bytes.
    pub size: Option<u64>,
    /// Whether the image takes no more writes because of it. Not so for one that took none before.
    pub fatal: bool,
}

type Hook = Box<dyn Fn(&Corruption) + Send + Sync>;

/// Who is to be told.
#[derive(Default)]
pub(super) struct Listener(Mutex<Option<Hook>>);

impl Debug for Listener {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

impl Listener {
    /// Replaces who is told.
    pub(crate) fn set(&self, hook: Hook) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(hook);
    }

    /// Tells it. The caller may hold the image's lock.
    pub(crate) fn tell(&self, corruption: &Corruption) {
        if let Some(hook) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            hook(corruption);
        }
    }
}
