//! New tables go behind the end of the file, where nothing refers to, until counts are right.

use crate::num::{to_u64, to_usize};
use crate::storage::Storage;
use crate::{Result, WriteBuf};

use super::super::image::Image;

/// Writes at the end of the file, in whole clusters.
#[derive(Debug)]
pub(super) struct Append<'a> {
    storage: &'a dyn Storage,
    cluster_size: u64,
    end: u64,
}

impl<'a> Append<'a> {
    /// Starts at the first cluster from `clusters` on.
    pub(super) fn new(image: &Image<'a>, clusters: u64) -> Self {
        Self {
            storage: image.storage,
            cluster_size: image.cluster_size(),
            end: clusters.max(image.clusters()) << image.cluster_bits,
        }
    }

    /// Writes a table; gives its offset. It is durable after a flush only.
    pub(super) fn put(&mut self, table: &[u8]) -> Result<u64> {
        let mut bytes = table.to_vec();
        bytes.resize(to_usize(to_u64(table.len()).next_multiple_of(self.cluster_size)), 0);
        let at = self.end;
        self.storage.write_at(at, &[WriteBuf::new(&bytes)])?;
        self.end += to_u64(bytes.len());
        Ok(at)
    }
}
