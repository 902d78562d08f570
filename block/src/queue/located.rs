//! Where the bytes of a request are, told by a format without waiting.

use std::ops::Range;
use std::sync::Arc;

use crate::node::Access;
use crate::num::{to_u64, to_usize};
use crate::qcow2::{Held, Target};
use crate::storage::Storage;

use super::bufs::AlignedBuf;

/// Bytes that are copied at once on each side of a small write; more is a matter for a thread. A queue
/// may hold as many for each of its requests.
pub(crate) const MAX_COPY: usize = 64 << 10;
/// Copies whose memory one request's list keeps for the next: one on each side.
const MAX_SPARE: usize = 2;

/// Where a part of a request is.
#[derive(Debug)]
pub(crate) enum Place {
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In a storage from an offset on. A write there has what was there before and behind the
    /// request's bytes.
    Storage {
        /// Which.
        storage: Arc<dyn Storage>,
        /// Of the request's first byte.
        offset: u64,
        /// To be written before it.
        before: Around,
        /// To be written behind its last.
        behind: Around,
    },
}

/// What is written beside the bytes of a request.
#[derive(Debug)]
pub(crate) enum Around {
    /// That many zeroes.
    Zeroes(u64),
    /// A part of a copy of what the guest reads there.
    Copy(AlignedBuf, Range<usize>),
}

impl Around {
    pub(crate) fn none() -> Self {
        Self::Zeroes(0)
    }

    fn into_copy(self) -> Option<AlignedBuf> {
        match self {
            Self::Zeroes(_) => None,
            Self::Copy(bytes, _) => Some(bytes),
        }
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Zeroes(len) => *len,
            Self::Copy(_, range) => to_u64(range.len()),
        }
    }

    /// Adds it to a list of buffers, which are good for as long as `self` is: moving it does not
    /// move the copy.
    pub(super) fn push_to(&self, iovs: &mut Vec<libc::iovec>) {
        match self {
            Self::Zeroes(len) => zeroes(*len, iovs),
            Self::Copy(bytes, range) => {
                let part = bytes.get(range.clone()).unwrap_or_default();
                let iov_base = part.as_ptr().cast_mut().cast();
                iovs.push(libc::iovec { iov_base, iov_len: part.len() });
            }
        }
    }
}

/// Zeroes around the bytes of a request, aligned for O_DIRECT.
#[repr(C, align(4096))]
struct Zeroes([u8; 64 << 10]);
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

/// Adds zeroes to a list of buffers.
fn zeroes(mut len: u64, iovs: &mut Vec<libc::iovec>) {
    while len > 0 {
        let now = to_usize(len).min(ZEROES.0.len());
        let iov_base = ZEROES.0.as_ptr().cast_mut().cast();
        iovs.push(libc::iovec { iov_base, iov_len: now });
        len -= to_u64(now);
    }
}

/// A part of a request whose bytes are in a row.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) len: u64,
    pub(crate) place: Place,
}

/// Where all of a request is, with the right to transfer it: the guest ranges are held until this is
/// cleared.
#[derive(Debug, Default)]
pub struct Located {
    pub(crate) extents: Vec<Extent>,
    pub(crate) held: Vec<Held>,
    /// New places that [`crate::Format::finish_write`] puts into the tables.
    pub(crate) targets: Vec<Target>,
    /// The request was not located because another is in the way.
    pub(crate) conflict: bool,
    /// Memory of copies that were written, for the next: fresh pages cost as much as a copy.
    spare: Vec<AlignedBuf>,
    /// The backing images that the places are in stay what they are meanwhile. The last to go: who
    /// waits for them may close the files.
    pub(crate) entered: Vec<Access>,
}

impl Located {
    /// Gives up the right, and is empty.
    pub(crate) fn clear(&mut self) {
        for extent in self.extents.drain(..) {
            if let Place::Storage { before, behind, .. } = extent.place {
                let copies = [before, behind].into_iter().filter_map(Around::into_copy);
                self.spare.extend(copies.take(MAX_SPARE - self.spare.len().min(MAX_SPARE)));
            }
        }
        self.targets.clear();
        self.held.clear();
        self.conflict = false;
        self.entered.clear();
    }

    /// Adds a part that is in a storage.
    pub(crate) fn push_storage(&mut self, storage: &Arc<dyn Storage>, offset: u64, len: u64) {
        let storage = storage.clone();
        let (before, behind) = (Around::none(), Around::none());
        self.extents
            .push(Extent { len, place: Place::Storage { storage, offset, before, behind } });
    }

    /// Memory for a copy of up to [`MAX_COPY`] bytes.
    pub(crate) fn copy_buf(&mut self) -> AlignedBuf {
        self.spare.pop().unwrap_or_else(|| AlignedBuf::new(MAX_COPY))
    }

    /// Fills memory with the bytes of a located read, if the page cache has all of them.
    pub(crate) fn read_cached(&self, mut into: &mut [u8]) -> bool {
        for extent in &self.extents {
            let Some((part, rest)) = into.split_at_mut_checked(to_usize(extent.len)) else {
                return false;
            };
            let cached = match &extent.place {
                Place::Zero => {
                    part.fill(0);
                    true
                }
                Place::Storage { storage, offset, .. } => storage.read_cached(*offset, part),
            };
            if !cached {
                return false;
            }
            into = rest;
        }
        true
    }

    /// Adds a part that reads as zeroes.
    pub(crate) fn push_zero(&mut self, len: u64) {
        if len > 0 {
            self.extents.push(Extent { len, place: Place::Zero });
        }
    }
}
