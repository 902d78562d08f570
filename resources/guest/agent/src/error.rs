//! What a command answers when it fails.

use core::fmt;

use crate::sys::Errno;

/// Why a command failed; its text follows `error` in the answer.
pub enum Error {
    /// The request itself is wrong: what is missing or cannot be understood.
    Request(&'static str),
    /// A system call failed: what was attempted, and the error number.
    System(&'static str, Errno),
    /// The data is not what it should be: the byte offset of the first wrong byte.
    Mismatch(u64),
    /// The command does not fit the present state.
    State(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request(what) => write!(to, "request: {what}"),
            Self::System(what, errno) => write!(to, "{what}: errno={}", errno.0),
            Self::Mismatch(offset) => write!(to, "mismatch: offset={offset}"),
            Self::State(what) => write!(to, "state: {what}"),
        }
    }
}

/// Names what was attempted when a system call fails.
pub trait During<T> {
    /// `what` says what was attempted, in a word or two.
    fn during(self, what: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, Errno> {
    fn during(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|errno| Error::System(what, errno))
    }
}
