//! Interceptors, who must act before a node's contents change.
//!
//! ```text
//!   write ──> outer gate ──> before(), of each in turn ──> the node's gate ──> the change ──> after() ──> done
//!                              I/O: old contents are saved                    I/O: the copy follows
//! ```
//!
//! Without an interceptor a change takes the node's gate only. With one it is carried out by a thread
//! that may wait, never by the owner of a [`crate::queue::Queue`].
//!
//! The outer gate is for changes alone, and is left last. Nobody holds a node's own gate while
//! interceptors work, so they may read the node, and write others that read it (a target whose
//! backing file the node is). Who holds requests of several nodes back closes all outer gates before
//! the first of the others, as what waits behind an outer gate may need any other gate.
//!
//! Interceptors come only while both gates let nobody through: every change that is made later is
//! seen, and none that was begun before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::Node;
use super::gate::{Gate, Holding};
use crate::num::to_usize;
use crate::queue::AlignedBuf;
use crate::{Result, WriteBuf, iobuf};

/// A change of a node's contents.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// Where it starts, in bytes of the disk.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// What is done.
    pub kind: ChangeKind<'a>,
}

/// What a change does.
#[derive(Debug, Clone, Copy)]
pub enum ChangeKind<'a> {
    /// Writes the buffers one after another.
    Write(&'a [WriteBuf<'a>]),
    /// As `Write`, compressed.
    Compressed(&'a [WriteBuf<'a>]),
    /// Makes the range read as zeroes.
    Zeroes {
        /// Whether its space may be given back.
        unmap: bool,
    },
    /// Tells that the range is not needed.
    Discard,
}

impl<'a> Change<'a> {
    pub(crate) fn write(offset: u64, bufs: &'a [WriteBuf<'a>]) -> Self {
        Self { offset, len: iobuf::total_len(bufs), kind: ChangeKind::Write(bufs) }
    }

    pub(crate) fn compressed(offset: u64, bufs: &'a [WriteBuf<'a>]) -> Self {
        Self { offset, len: iobuf::total_len(bufs), kind: ChangeKind::Compressed(bufs) }
    }

    pub(crate) fn zeroes(offset: u64, len: u64, unmap: bool) -> Self {
        Self { offset, len, kind: ChangeKind::Zeroes { unmap } }
    }

    pub(crate) fn discard(offset: u64, len: u64) -> Self {
        Self { offset, len, kind: ChangeKind::Discard }
    }

    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Acts before, and after, each change of a node.
pub trait Interceptor: Send + Sync {
    /// Comes before a change that lies within the disk, from a thread that may wait. What it returns is told how the
    /// change went, before anybody else is.
    ///
    /// # Errors
    /// The change is not made, and fails with this.
    fn before(&self, change: &Change<'_>) -> Result<Option<Box<dyn Turn + '_>>>;

    /// Whether [`Turn::after`] needs the same bytes that were written: the guest may change its memory
    /// while it is being written, so a copy is written then.
    fn uses_data(&self) -> bool {
        false
    }
}

/// A change under way, to an [`Interceptor`].
pub trait Turn {
    /// The change was made, or failed and may have been made in part.
    fn after(self: Box<Self>, change: &Change<'_>, result: &Result<()>);
}

type List = Arc<Vec<Arc<dyn Interceptor>>>;

/// The interceptors of a node.
#[derive(Default)]
pub(super) struct Interception {
    gate: Arc<Gate>,
    list: RwLock<List>,
    /// Looked at by every change, inside the node's gate: nearly always false.
    any: AtomicBool,
}

impl Interception {
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    fn list(&self) -> List {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<dyn Interceptor>>)) {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        let mut new = list.to_vec();
        change(&mut new);
        self.any.store(!new.is_empty(), Ordering::Release);
        *list = Arc::new(new);
    }

    /// Carries out a change between what the interceptors do before and after it. Gives its result, and
    /// what `make` says, unless an interceptor has refused the change.
    pub(super) fn around<T>(
        &self,
        change: &Change<'_>,
        make: impl FnOnce(&Change<'_>) -> (Result<()>, T),
    ) -> (Result<()>, Option<T>) {
        let _passage = self.gate.enter();
        let list = self.list();
        let mut turns = Vec::with_capacity(list.len());
        for interceptor in list.iter() {
            // Those before it are told that nothing came of the change.
            match interceptor.before(change) {
                Ok(turn) => turns.extend(turn),
                Err(error) => {
                    let failed = Err(error);
                    end(turns, change, &failed);
                    return (failed, None);
                }
            }
        }
        let copy = list.iter().any(|i| i.uses_data()).then(|| Copy::of(change)).flatten();
        let bufs = copy.as_ref().map(|copy| [WriteBuf::new(&copy.bytes)]);
        let change = match (&bufs, change.kind) {
            (Some(bufs), ChangeKind::Write(_)) => Change::write(change.offset, bufs),
            (Some(bufs), ChangeKind::Compressed(_)) => Change::compressed(change.offset, bufs),
            _ => *change,
        };
        let (result, made) = make(&change);
        end(turns, &change, &result);
        (result, Some(made))
    }
}

fn end(turns: Vec<Box<dyn Turn + '_>>, change: &Change<'_>, result: &Result<()>) {
    for turn in turns {
        turn.after(change, result);
    }
}

/// The bytes of a write, which nobody changes.
struct Copy {
    bytes: AlignedBuf,
}

impl Copy {
    fn of(change: &Change<'_>) -> Option<Self> {
        let (ChangeKind::Write(bufs) | ChangeKind::Compressed(bufs)) = change.kind else {
            return None;
        };
        let mut bytes = AlignedBuf::new(to_usize(change.len));
        iobuf::copy_out(bufs, &mut bytes);
        Some(Self { bytes })
    }
}

impl Node {
    /// Holds changes that are intercepted back, and waits for those under way. To be called for all
    /// nodes whose gates are to be held, before the first of these.
    pub(crate) fn hold_changes(&self) -> Holding {
        self.interception.gate.hold()
    }

    /// Whether changes are intercepted. Who has an [`super::Access`] has the answer for as long as it lives.
    pub(crate) fn intercepted(&self) -> bool {
        self.interception.any()
    }

    /// Has every later change go through `interceptor`. Both gates must let nobody through.
    pub(crate) fn intercept(&self, interceptor: Arc<dyn Interceptor>) {
        self.interception.change(|list| list.push(interceptor));
    }

    /// Ends [`Node::intercept`], and waits for the changes that `interceptor` is at.
    pub(crate) fn unintercept(&self, interceptor: &Arc<dyn Interceptor>) {
        self.interception.change(|list| {
            list.retain(|other| !std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(interceptor)));
        });
        drop(self.interception.gate.hold());
    }
}
