//! The right to carry out one request.

use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;

use super::gate::Passage;
use crate::format::Format;
use crate::snapshot::{SnapshotSizes, VmStateRead};
use crate::status::StatusExtent;
use crate::{ReadBuf, Result};

/// The right to carry out one request: the image stays what it is until it is dropped.
///
/// It reads and looks. Changes go through [`super::Node`] or [`super::Link`], which tell bitmaps,
/// observers and interceptors of them.
pub struct Access {
    format: Arc<dyn Format>,
    _passage: Passage,
}

impl Debug for Access {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("driver", &self.format.driver()).finish_non_exhaustive()
    }
}

impl Access {
    pub(super) fn new(format: Arc<dyn Format>, passage: Passage) -> Self {
        Self { format, _passage: passage }
    }

    /// The image, for those who do what [`super::Node`]'s own methods do about changes: look for
    /// interceptors before, and call [`super::Node::note_write`] after.
    pub(crate) fn format(&self) -> &dyn Format {
        &*self.format
    }

    /// Size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.format.size()
    }

    /// As [`Format::read`].
    ///
    /// # Errors
    /// As [`Format::read`].
    pub fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.format.read(offset, bufs)
    }

    /// As [`Format::flush`].
    ///
    /// # Errors
    /// As [`Format::flush`].
    pub fn flush(&self) -> Result<()> {
        self.format.flush()
    }

    /// As [`Format::block_status`].
    ///
    /// # Errors
    /// As [`Format::block_status`].
    pub fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.format.block_status(offset, len)
    }

    /// As [`Format::copy_up`], which changes nothing that is read.
    ///
    /// # Errors
    /// As [`Format::copy_up`].
    pub(crate) fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        self.format.copy_up(offset, len)
    }

    /// As [`Format::compressed_cluster`].
    pub fn compressed_cluster(&self) -> Option<u64> {
        self.format.compressed_cluster()
    }

    /// As [`Format::supports_snapshots`].
    pub fn supports_snapshots(&self) -> bool {
        self.format.supports_snapshots()
    }

    /// As [`Format::snapshot_sizes`].
    ///
    /// # Errors
    /// As [`Format::snapshot_sizes`].
    pub fn snapshot_sizes(&self, id: &str) -> Result<SnapshotSizes> {
        self.format.snapshot_sizes(id)
    }

    /// As [`Format::look_at_vmstate`].
    ///
    /// # Errors
    /// As [`Format::look_at_vmstate`].
    pub fn look_at_vmstate(&self, id: &str) -> Result<Box<dyn VmStateRead + '_>> {
        self.format.look_at_vmstate(id)
    }
}
