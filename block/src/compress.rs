//! The `compress` filter: what is written through it is compressed by the image below.
//!
//! Compressed clusters are written whole: of one that is written in part, the rest is read first. Such
//! a write is alone; writes of whole clusters go in parallel.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::format::Format;
use crate::iobuf;
use crate::num::to_usize;
use crate::status::StatusExtent;
use crate::{Error, ReadBuf, Result, WriteBuf};

/// A filter over a format that can write compressed clusters (QEMU's `compress` driver).
pub struct CompressFilter {
    below: Arc<dyn Format>,
    cluster: u64,
    /// Held alone by what reads and writes back a cluster.
    partial: RwLock<()>,
}

impl CompressFilter {
    /// Puts the filter over `below`.
    ///
    /// # Errors
    /// If `below` cannot write compressed clusters.
    pub fn new(below: Arc<dyn Format>) -> Result<Self> {
        let Some(cluster) = below.compressed_cluster() else {
            return Err(Error::NotSupported(format!(
                "Compression is not supported for this drive {}",
                below.driver()
            )));
        };
        Ok(Self { below, cluster, partial: RwLock::default() })
    }

    /// The part of a range that is made of whole clusters; the disk's end counts as one.
    fn whole(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset + len;
        let stop = if end == self.below.size() { end } else { end - end % self.cluster };
        let start = offset.next_multiple_of(self.cluster);
        start.min(stop)..stop
    }

    /// Writes a part of one cluster: the cluster is read and written back.
    fn write_part(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let _alone = self.partial.write().unwrap_or_else(PoisonError::into_inner);
        let start = offset - offset % self.cluster;
        let end = (start + self.cluster).min(self.below.size());
        let mut bytes = vec![0; to_usize(end.saturating_sub(start))];
        self.below.read(start, &[ReadBuf::new(&mut bytes)])?;
        iobuf::copy_out(bufs, &mut bytes[to_usize(offset - start)..]);
        self.below.write_compressed(start, &[WriteBuf::new(&bytes)])
    }
}

impl Format for CompressFilter {
    fn driver(&self) -> &'static str {
        "compress"
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_only(&self) -> bool {
        self.below.read_only()
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.below.read(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        let size = self.size();
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let Some(end) = end else {
            return Err(Error::OutOfRange { offset, len, size });
        };
        let mut at = offset;
        while at < end {
            let whole = self.whole(at, end - at);
            let n = if whole.start == at && whole.end > at {
                whole.end - at
            } else {
                // Up to the end of this cluster only.
                (self.cluster - at % self.cluster).min(end - at)
            };
            let part = iobuf::slice_write(bufs, at - offset, n);
            if whole.start == at && whole.end > at {
                let _others = self.partial.read().unwrap_or_else(PoisonError::into_inner);
                self.below.write_compressed(at, &part)?;
            } else {
                self.write_part(at, &part)?;
            }
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _alone = self.partial.write().unwrap_or_else(PoisonError::into_inner);
        self.below.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let _alone = self.partial.write().unwrap_or_else(PoisonError::into_inner);
        self.below.write_zeroes(offset, len, unmap)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.below.block_status(offset, len)
    }

    fn fast_zeroes(&self) -> bool {
        self.below.fast_zeroes()
    }
}
