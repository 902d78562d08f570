//! What a user of a node holds: the node as it is now, whichever that is.

use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, PoisonError, RwLock};

use super::{Access, Change, Node};
use crate::{Error, ReadBuf, Result, WriteBuf};

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

impl Entered {
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// What the request may do there.
    pub fn access(&self) -> &Access {
        &self.access
    }
}

/// Requests as those of [`Node`], on the node that the link names once they are begun.
impl Link {
    /// As [`Node::read`].
    ///
    /// # Errors
    /// As [`Node::read`].
    pub fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.enter().access.read(offset, bufs)
    }

    /// As [`Node::write`]; with `fua` it is durable afterwards.
    ///
    /// # Errors
    /// As [`Node::write`].
    pub fn write(&self, offset: u64, bufs: &[WriteBuf<'_>], fua: bool) -> Result<()> {
        self.change(&Change::write(offset, bufs), fua)
    }

    /// As [`Node::discard`].
    ///
    /// # Errors
    /// As [`Node::discard`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.change(&Change::discard(offset, len), false)
    }

    /// As [`Node::write_zeroes`]; with `fua` they are durable afterwards.
    ///
    /// # Errors
    /// As [`Node::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, fua: bool) -> Result<()> {
        self.change(&Change::zeroes(offset, len, unmap), fua)
    }

    /// As [`Node::flush`].
    ///
    /// # Errors
    /// As [`Node::flush`].
    pub fn flush(&self) -> Result<()> {
        self.enter().access.flush()
    }

    fn change(&self, change: &Change<'_>, fua: bool) -> Result<()> {
        loop {
            let entered = self.enter();
            if !entered.node.intercepts(change) {
                return entered.make(change, fua);
            }
            let node = entered.node.clone();
            drop(entered);
            // Interceptors work outside the gate, where the link may come to name another node.
            let made = |change: &Change<'_>| {
                let entered = self.enter();
                if Arc::ptr_eq(&entered.node, &node) {
                    (entered.make(change, fua), true)
                } else {
                    (Err(Error::Cancelled), false)
                }
            };
            match node.interception.around(change, made) {
                (_, Some(false)) => {}
                (result, _) => return result,
            }
        }
    }
}

impl Entered {
    fn make(&self, change: &Change<'_>, fua: bool) -> Result<()> {
        self.node.make(&self.access, change)?;
        if fua { self.access.flush() } else { Ok(()) }
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
