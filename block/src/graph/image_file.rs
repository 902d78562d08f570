//! A node as the file of a new image, for blockdev-create.

use std::sync::Arc;

use super::{Attachment, Graph, User, build};
use crate::Result;
use crate::perm::Perm;
use crate::storage::Storage;

/// A node whose bytes are written to from outside. It is in use until this is dropped.
pub(crate) struct ImageFile {
    pub(crate) storage: Arc<dyn Storage>,
    _use: Attachment,
}

impl Graph {
    /// Takes a protocol node to make an image in it.
    ///
    /// # Errors
    /// There is no such node, it does not go together with what others do, or it is not a file's.
    pub(crate) fn image_file(&self, name: &str) -> Result<ImageFile> {
        let user = User::unnamed(Perm::WRITE | Perm::RESIZE, Perm::all());
        let attachment = self.attach(name, user)?;
        let storage = build::storage_of(&attachment.node())?;
        Ok(ImageFile { storage, _use: attachment })
    }
}
