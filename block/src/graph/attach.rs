//! Devices and exports as users of nodes.

use std::sync::{Arc, Mutex};

use super::open::{no_such_node, not_found};
use super::permissions::{Edge, Parent, Role};
use super::{Graph, State, lock};
use crate::node::{Link, Node};
use crate::perm::{Perm, Permissions};
use crate::{Error, Preallocation, Progress, Result};

/// A user of a node that is not a node itself: who it is, what it does, what it lets others do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    description: String,
    permissions: Permissions,
    /// Follows when another node takes the node's place.
    follows: bool,
    /// Hides from the nodes below what the node's other users need.
    below_others: bool,
}

impl User {
    /// A guest's disk: `id` is its name or its path. Others may write only if it was said that the
    /// guest knows of it (`share-rw`).
    pub fn device(id: &str, writable: bool, share_rw: bool) -> Self {
        // The guest is told of another size.
        let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        shared.set(Perm::WRITE, share_rw);
        let permissions = Permissions { used: used(writable), shared };
        Self {
            description: format!("block device '{id}'"),
            permissions,
            follows: true,
            below_others: false,
        }
    }

    /// An export. Others may write meanwhile, but not change the size.
    pub fn export(writable: bool) -> Self {
        let shared = Perm::all() - Perm::RESIZE;
        Self { follows: true, ..Self::unnamed(used(writable), shared) }
    }

    /// A job that sees to it that the others who use the node read the same through it whatever is done
    /// to the nodes below: what they need of these is not asked for.
    pub(crate) fn below_others(used: Perm, shared: Perm) -> Self {
        Self { below_others: true, ..Self::unnamed(used, shared) }
    }

    /// A user for as long as a command or a job takes; it stays at its node.
    pub fn unnamed(used: Perm, shared: Perm) -> Self {
        let permissions = Permissions { used, shared };
        Self {
            description: "an unnamed block device".to_owned(),
            permissions,
            follows: false,
            below_others: false,
        }
    }
}

fn used(writable: bool) -> Perm {
    if writable { Perm::CONSISTENT_READ | Perm::WRITE } else { Perm::CONSISTENT_READ }
}

/// A use of a node by a device, an export or a command; ends when dropped.
pub struct Attachment {
    link: Link,
    id: u64,
    state: Arc<Mutex<State>>,
}

impl Attachment {
    /// The node as it is now. Who goes on to use it for long takes [`Attachment::link`].
    pub fn node(&self) -> Arc<Node> {
        self.link.node()
    }

    /// What requests go through: the node, or the one that has taken its place.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Uses the node for something else from now on, as a job does whose work is done while its node
    /// has to take the place of another.
    ///
    /// # Errors
    /// It does not go together with what others do or allow; the use stays as it was.
    pub fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let mut state = lock(&self.state);
        let mut edges = state.edges.clone();
        for edge in &mut edges {
            if let Parent::User { id, permissions: place, .. } = &mut edge.parent
                && *id == self.id
            {
                *place = permissions;
            }
        }
        state.take_locks(&edges)?;
        state.edges = edges;
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let mine = |edge: &Edge| matches!(&edge.parent, Parent::User { id, .. } if *id == self.id);
        state.edges.retain(|edge| !mine(edge));
        state.followers.remove(&self.id);
        let orphans = state.forget_orphans();
        state.put_locks_back();
        drop(state);
        // Outside the lock: closing an image takes as long as the disk takes.
        drop(orphans);
    }
}

impl Graph {
    /// Makes a device, an export or a command a user of a node, and takes the file locks for it.
    ///
    /// # Errors
    /// If there is no such node, it is read-only, or what the user does and what others allow do
    /// not go together; with QEMU's text.
    pub fn attach(&self, name: &str, user: User) -> Result<Attachment> {
        let mut state = self.state();
        let node = state.get(name).cloned().ok_or_else(|| not_found(name))?;
        let id = state.next_user;
        let User { description, permissions, follows, below_others } = user;
        let parent = Parent::User { id, description, permissions, below_others };
        let edge = Edge { parent, child: name.to_owned(), label: "root", role: Role::Filtered };
        let mut edges = state.edges.clone();
        edges.push(edge);
        state.take_locks(&edges)?;
        state.edges = edges;
        state.next_user += 1;
        let link = Link::new(node);
        if follows {
            state.followers.insert(id, link.clone());
        }
        Ok(Attachment { link, id, state: Arc::clone(&self.state) })
    }

    /// As [`Graph::attach`] for an export.
    ///
    /// # Errors
    /// As for [`Graph::attach`] and [`Graph::check_export`].
    pub fn attach_export(&self, name: &str, writable: bool) -> Result<Attachment> {
        self.check_export(name, writable)?;
        // QEMU finds out in two steps, which decides which conflict is told of.
        drop(self.attach(name, User::unnamed(used(writable), Perm::all()))?);
        self.attach(name, User::export(writable))
    }

    /// block_resize: gives a disk another size, in bytes. Requests wait meanwhile.
    ///
    /// # Errors
    /// There is no such node, a user of it relies on its size, a job works on it or a snapshot of it is
    /// being made, or the image cannot be resized.
    pub fn resize(&self, name: &str, size: u64) -> Result<()> {
        self.state().check_unclaimed(name)?;
        self.state().check_no_overlay(name)?;
        let user = self.attach(name, User::unnamed(Perm::RESIZE, Perm::all()))?;
        let node = user.node();
        let _alone = node.occupy_alone("resize")?;
        node.resize(size, Preallocation::Off, &Progress::default())
    }

    /// What can be said of an export before it is made.
    ///
    /// # Errors
    /// The node is missing, or read-only where clients are to write; the texts of QEMU's
    /// block-export-add.
    pub fn check_export(&self, name: &str, writable: bool) -> Result<()> {
        let node = self.get(name).ok_or_else(|| no_such_node(name))?;
        if writable && node.read_only() {
            return Err(Error::Invalid("Cannot export read-only node as writable".to_owned()));
        }
        if writable && node.refuses_writes() && !node.is_inactive() {
            return Err(Error::Invalid(format!(
                "Cannot export node '{name}' as writable: its image was found corrupt and takes no writes before it is repaired (tardigrade image check --repair all)"
            )));
        }
        Ok(())
    }
}
