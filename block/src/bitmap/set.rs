//! The bitmaps of a node.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{Error, Result};

use super::dirty::{Start, Stored};
use super::{Bitmap, BitmapInfo};

/// Longest name in bytes (QEMU's BDRV_BITMAP_MAX_NAME_SIZE).
pub(crate) const MAX_NAME: usize = 1023;

/// All bitmaps of a node, in order of their making. All methods may be called from several threads.
#[derive(Debug, Default)]
pub struct BitmapSet {
    list: RwLock<Vec<Arc<Bitmap>>>,
    /// Looked at by every write: nearly always there is no bitmap.
    any: AtomicBool,
}

impl BitmapSet {
    fn list(&self) -> RwLockReadGuard<'_, Vec<Arc<Bitmap>>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, Vec<Arc<Bitmap>>> {
        self.list.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, in order of their making.
    pub fn all(&self) -> Vec<Arc<Bitmap>> {
        self.list().clone()
    }

    /// What QMP tells of them, the newest first.
    pub fn infos(&self) -> Vec<BitmapInfo> {
        self.list().iter().rev().map(|bitmap| bitmap.info()).collect()
    }

    /// The bitmap of that name.
    ///
    /// # Errors
    /// With QEMU's text if there is none.
    pub fn get(&self, name: &str) -> Result<Arc<Bitmap>> {
        let list = self.list();
        let found = list.iter().find(|bitmap| bitmap.name() == name);
        found.cloned().ok_or_else(|| Error::Invalid(format!("Dirty bitmap '{name}' not found")))
    }

    /// Notes a write that has ended, in all bitmaps that are enabled.
    pub(crate) fn note(&self, offset: u64, len: u64) {
        if len == 0 || !self.any.load(Ordering::Acquire) {
            return;
        }
        for bitmap in self.list().iter() {
            bitmap.note(offset, len);
        }
    }

    /// Adds a bitmap.
    ///
    /// # Errors
    /// With QEMU's text if its name is empty, too long or taken.
    pub(crate) fn add(&self, bitmap: Arc<Bitmap>) -> Result<()> {
        let name = bitmap.name();
        if name.is_empty() {
            return Err(Error::Invalid("Bitmap name cannot be empty".to_owned()));
        }
        let mut list = self.change();
        if list.iter().any(|other| other.name() == name) {
            return Err(Error::Invalid(format!("Bitmap already exists: {name}")));
        }
        if name.len() > MAX_NAME {
            return Err(Error::Invalid(format!("Bitmap name too long: {name}")));
        }
        list.push(bitmap);
        self.any.store(true, Ordering::Release);
        Ok(())
    }

    pub(crate) fn remove(&self, bitmap: &Arc<Bitmap>) {
        let mut list = self.change();
        list.retain(|other| !Arc::ptr_eq(other, bitmap));
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    /// Whether the disk may get another size.
    ///
    /// # Errors
    /// If an export has a bitmap, or one would be too large.
    pub(crate) fn check_resize(&self, size: u64) -> Result<()> {
        for bitmap in self.list().iter().filter(|bitmap| !bitmap.inconsistent()) {
            bitmap.check_usable()?;
            bitmap.check_size(size)?;
        }
        Ok(())
    }

    /// Follows a change of the disk's size, after [`BitmapSet::check_resize`].
    pub(crate) fn resize(&self, size: u64) {
        for bitmap in self.list().iter().filter(|bitmap| !bitmap.inconsistent()) {
            bitmap.resize(size);
        }
    }

    /// Takes the bitmaps of `old` over when the image of this set takes the place of the one of
    /// `old`, which has stored them and is left without any: who holds a bitmap goes on holding it.
    pub(crate) fn adopt(&self, old: &Self) {
        if std::ptr::eq(self, old) {
            return;
        }
        let theirs = std::mem::take(&mut *old.change());
        old.any.store(false, Ordering::Release);
        let mut list = self.change();
        for bitmap in theirs {
            match list.iter_mut().find(|other| other.name() == bitmap.name()) {
                Some(loaded) => {
                    bitmap.follow(loaded);
                    *loaded = bitmap;
                }
                // In memory only, or not to be stored on a disk of this size.
                None => list.push(bitmap),
            }
        }
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    /// Those that are stored in the image.
    pub(crate) fn persistent(&self) -> Vec<Arc<Bitmap>> {
        self.list().iter().filter(|bitmap| bitmap.persistent()).cloned().collect()
    }
}

impl Start {
    /// Of a bitmap made by a command.
    pub(crate) fn new(enabled: bool, persistent: bool) -> Self {
        Self { enabled, persistent, inconsistent: false, read_only: false, stored: Stored::No }
    }
}
