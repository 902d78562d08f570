//! What becomes of a request once the queue has done its part.

use crate::Error;

use super::super::wire::Errno;
use super::super::wire::reply::To;

/// A request in flight, or a part of one.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) to: To,
    pub(super) work: Work,
}

/// What it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Read {
        offset: u64,
        /// The request it is a part of.
        group: Option<usize>,
    },
    Write,
    Flush,
    Trim {
        fua: bool,
    },
    Zero,
    Cache,
}

/// A read in several parts.
#[derive(Debug)]
pub(super) struct Group {
    /// Parts in flight.
    pub(super) left: usize,
    /// The first error of a part.
    pub(super) error: Option<Errno>,
}

impl Work {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim { .. } => "trim",
            Self::Zero => "write of zeroes",
            Self::Cache => "cache",
        }
    }

    /// What a client is told: not more, for an error's text may name files of the host.
    pub(super) fn failure(self) -> &'static str {
        match self {
            Self::Read { .. } => "read failed",
            Self::Write => "write failed",
            Self::Flush => "flush failed",
            Self::Trim { .. } => "trim failed",
            Self::Zero => "write of zeroes failed",
            Self::Cache => "cache failed",
        }
    }
}

/// The protocol's number for an error ("Error values").
pub(super) fn errno_of(error: &Error) -> Errno {
    match error.errno() {
        libc::EPERM | libc::EACCES | libc::EROFS => Errno::Perm,
        libc::ENOMEM => Errno::NoMem,
        libc::EINVAL => Errno::Inval,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Errno::NoSpc,
        _ => Errno::Io,
    }
}
