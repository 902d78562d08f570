//! A node as those above it see it.

use std::sync::Arc;

use crate::format::Format;
use crate::node::Node;
use crate::queue::Located;
use crate::stack::deep;
use crate::{ReadBuf, Result, StatusExtent};

/// A node as what those above read from.
pub(in crate::graph) fn below(node: Arc<Node>) -> Arc<dyn Format> {
    Arc::new(Below(node))
}

/// A backing node as what its overlay reads from: whatever the node's image is by then.
struct Below(Arc<Node>);

impl Format for Below {
    fn driver(&self) -> &'static str {
        self.0.driver()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        deep(|| self.0.read(offset, bufs))
    }

    fn fast_zeroes(&self) -> bool {
        self.0.fast_zeroes()
    }

    fn write(&self, offset: u64, bufs: &[crate::WriteBuf<'_>]) -> Result<()> {
        self.0.write(offset, bufs)
    }

    fn compressed_cluster(&self) -> Option<u64> {
        self.0.access().compressed_cluster()
    }

    fn write_compressed(&self, offset: u64, bufs: &[crate::WriteBuf<'_>]) -> Result<()> {
        self.0.write_compressed(offset, bufs)
    }

    /// While the image is being replaced, a request thread waits in the caller's place.
    fn locate_read(&self, offset: u64, len: u64, out: &mut Located) -> bool {
        let Some(access) = self.0.try_access() else {
            return false;
        };
        let found = deep(|| access.format().locate_read(offset, len, out));
        out.entered.push(access);
        found
    }

    /// Does not wait for one who waits for the caller: whoever replaces this image has closed the
    /// gate of the overlay before, so no request of it is here then.
    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        deep(|| self.0.access().block_status(offset, len))
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::Raw;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_located_read_of_a_backing_file_holds_it_and_a_closed_gate_is_not_waited_for() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 8192]));
        let node = Arc::new(Node::new("b", Arc::new(Raw::open(storage, true).unwrap())));
        let below = Below(node.clone());
        let mut located = Located::default();
        assert!(below.locate_read(4096, 512, &mut located));
        assert_eq!((located.extents.len(), located.entered.len()), (1, 1));
        let mut beyond = Located::default();
        assert!(!below.locate_read(8192, 512, &mut beyond));
        beyond.clear();
        let closer = {
            let node = node.clone();
            std::thread::spawn(move || node.close_gate())
        };
        while node.try_access().is_some() {
            std::thread::yield_now();
        }
        assert!(!closer.is_finished(), "closed with a read in flight");
        located.clear();
        let closed = closer.join().unwrap();
        assert!(!below.locate_read(4096, 512, &mut located));
        assert!(!located.conflict && located.entered.is_empty());
        drop(closed);
        assert!(below.locate_read(4096, 512, &mut located));
    }
}
