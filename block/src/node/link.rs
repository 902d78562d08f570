//! What a user of a node holds: the node as it is now, whichever that is.

use std::fmt::{self, Debug, Formatter};
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock};

use super::{Access, Node};
use crate::{ReadBuf, Result, WriteBuf};

/// A device's or an export's use of a node, which another node can take the place of (a snapshot's
/// overlay, a mirror's target) while requests go on. Clones are one link.
///
/// A link is set only while the gate of the node it leaves lets no request through. Who is through a
/// gate and finds the link unchanged therefore has the right node until the request is over.
#[derive(Clone)]
pub struct Link(Arc<RwLock<Arc<Node>>>);

/// One request that is under way: the node it goes to, and the right to carry it out there.
pub struct Entered {
    node: Arc<Node>,
    access: Access,
}

impl Link {
    /// A link to the node.
    pub fn new(node: Arc<Node>) -> Self {
        Self(Arc::new(RwLock::new(node)))
    }

    /// The node as it is now. Requests go through [`Link::enter`].
    pub fn node(&self) -> Arc<Node> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The right to carry out a request; waits while requests are held back. A thread that has to
    /// complete other requests of its own meanwhile calls [`Link::try_enter`] instead.
    pub fn enter(&self) -> Entered {
        loop {
            let node = self.node();
            let access = node.access();
            if self.is(&node) {
                return Entered { node, access };
            }
        }
    }

    /// As [`Link::enter`]; `None` while requests are held back.
    pub fn try_enter(&self) -> Option<Entered> {
        loop {
            let node = self.node();
            let access = node.try_access();
            if self.is(&node) {
                return access.map(|access| Entered { node, access });
            }
        }
    }

    fn is(&self, node: &Arc<Node>) -> bool {
        Arc::ptr_eq(&self.0.read().unwrap_or_else(PoisonError::into_inner), node)
    }

    /// Puts another node in the place of the one there is, whose gate must let nobody through.
    pub(crate) fn set(&self, node: Arc<Node>) {
        let old = {
            let mut place = self.0.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *place, node)
        };
        // Outside the lock: it may be the last handle of an image.
        drop(old);
    }
}

impl From<Arc<Node>> for Link {
    fn from(node: Arc<Node>) -> Self {
        Self::new(node)
    }
}

impl Debug for Link {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Link").field(&self.node()).finish()
    }
}

impl Debug for Entered {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entered").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Deref for Entered {
    type Target = Access;

    fn deref(&self) -> &Access {
        &self.access
    }
}

/// Requests as those of [`Node`], on the node that was entered.
impl Entered {
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// As [`Node::read`].
    ///
    /// # Errors
    /// As [`Node::read`].
    pub fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.access.read(offset, bufs)
    }

    /// As [`Node::write`].
    ///
    /// # Errors
    /// As [`Node::write`].
    pub fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.node.write_with(&self.access, offset, bufs)
    }

    /// As [`Node::discard`].
    ///
    /// # Errors
    /// As [`Node::discard`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.node.discard_with(&self.access, offset, len)
    }

    /// As [`Node::write_zeroes`].
    ///
    /// # Errors
    /// As [`Node::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.node.write_zeroes_with(&self.access, offset, len, unmap)
    }

    /// As [`Node::flush`].
    ///
    /// # Errors
    /// As [`Node::flush`].
    pub fn flush(&self) -> Result<()> {
        self.access.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::raw::Raw;
    use crate::storage::memory::MemoryStorage;

    fn node(name: &str) -> Arc<Node> {
        let storage = Arc::new(MemoryStorage::new(vec![0; 4096]));
        Arc::new(Node::new(name, Arc::new(Raw::open(storage, false).unwrap())))
    }

    #[test]
    fn who_waited_at_the_gate_of_a_node_that_was_replaced_goes_to_the_new_one() {
        let (old, new) = (node("old"), node("new"));
        let link = Link::new(old.clone());
        let held = old.hold_gate();
        assert!(link.try_enter().is_none());
        let waiting = {
            let link = link.clone();
            thread::spawn(move || link.enter().node().name().to_owned())
        };
        link.set(new);
        assert_eq!(link.try_enter().unwrap().node().name(), "new");
        drop(held);
        assert_eq!(waiting.join().unwrap(), "new");
    }
}
