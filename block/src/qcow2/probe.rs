//! An image before it is open: what its header tells, and whether it may be written to.

use std::sync::Arc;

use crate::storage::Storage;
use crate::{Error, Result};

use super::check;
use super::header::{Header, incompatible};
use super::options::Options;

/// The header of an image, read and checked, before its backing file is open.
#[derive(Debug)]
pub struct Probe {
    storage: Arc<dyn Storage>,
    header: Header,
}

impl Probe {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::NotFormat`], [`Error::Corrupt`] or [`Error::NotSupported`], saying what is wrong.
    pub fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = Header::read(&*storage)?;
        Ok(Self { storage, header })
    }

    pub(super) fn into_parts(self) -> (Arc<dyn Storage>, Header) {
        (self.storage, self.header)
    }

    /// The backing file's name as the image has it.
    pub fn backing_file(&self) -> Option<&str> {
        self.header.backing_file.as_deref()
    }

    /// Whether data clusters are in another file, which must be opened too.
    pub fn needs_data_file(&self) -> bool {
        self.header.geometry.external
    }

    /// That file's name as the image has it, if it has one.
    pub fn data_file(&self) -> Option<String> {
        self.header.data_file()
    }

    /// The backing file's format, where the image tells it.
    pub fn backing_format(&self) -> Option<&str> {
        self.header.backing_format.as_deref()
    }
}

/// Refuses an image that only a repair by hand may write to, and repairs one that was not closed
/// properly, whose refcounts may be behind. Gives its header as it is then.
pub(super) fn make_writable(storage: &Arc<dyn Storage>, header: Header) -> Result<Header> {
    if header.incompatible & incompatible::CORRUPT != 0 {
        return Err(Error::NotSupported(format!(
            "Image '{name}' is marked as corrupt and can be opened read-only only; repair it with: tardigrade image check --repair all '{name}'",
            name = storage.name()
        )));
    }
    if header.incompatible & incompatible::DIRTY == 0 {
        return Ok(header);
    }
    check::repair_at_open(&**storage)?;
    Header::read(&**storage)
}

/// An image with an external data file needs it; others must not have one. QEMU's texts.
pub(super) fn check_data_file(header: &Header, options: &Options) -> Result<()> {
    match (header.geometry.external, &options.data_file) {
        (true, None) => Err(Error::Invalid("'data-file' is required for this image".to_owned())),
        (false, Some(_)) => Err(Error::Invalid(
            "'data-file' can only be set for images with an external data file".to_owned(),
        )),
        _ => Ok(()),
    }
}
