//! The errors of this crate: what was tried, on what, and why it failed.

use std::io;

/// The host's words for an error, without Rust's "(os error N)": clients compare texts with QEMU's.
pub fn host_words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// The result of a block operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a block operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened.
    #[error("Could not open '{filename}': {}", host_words(source))]
    Open {
        /// The file's path as the user gave it.
        filename: String,
        /// What the host said.
        source: io::Error,
    },
    /// The image's backing file could not be opened.
    #[error("Could not open backing file of '{overlay}': {source}")]
    Backing {
        /// The path of the image that names the backing file.
        overlay: String,
        /// Why; it names the backing file.
        source: Box<Error>,
    },
    /// Another process uses the image in a way that excludes ours.
    #[error(
        "Failed to get {}\"{lock}\" lock. Is another process using the image [{filename}]?",
        if *shared { "shared " } else { "" }
    )]
    Locked {
        /// The file's path.
        filename: String,
        /// QEMU's name of the permission.
        lock: &'static str,
        /// Whether it is others' use that we do not allow, as opposed to ours that they do not.
        shared: bool,
    },
    /// The file is not an image of the format asked for.
    #[error("Image is not in {format} format: '{filename}' {reason}")]
    NotFormat {
        /// The format's name.
        format: &'static str,
        /// The file's path.
        filename: String,
        /// What was found instead.
        reason: String,
    },
    /// Options or a node name that make no sense; the text is what a QMP client gets.
    #[error("{0}")]
    Invalid(String),
    /// The host refused a read, write, flush or discard.
    #[error("{operation} at offset {offset:#x} of '{filename}' failed: {}", host_words(source))]
    Io {
        /// "read", "write", "flush", "discard", ...
        operation: &'static str,
        /// The file's path.
        filename: String,
        /// Host offset in bytes.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The request lies outside the node.
    #[error(
        "request of {len} bytes at offset {offset:#x} is beyond the end of the disk ({size} bytes)"
    )]
    OutOfRange {
        /// Guest offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The node's size in bytes.
        size: u64,
    },
    /// The node does not take writes.
    #[error("node '{0}' is read-only")]
    ReadOnly(String),
    /// The format or the node cannot do this.
    #[error("{0}")]
    NotSupported(String),
    /// The image breaks the rules of its format.
    #[error("Image '{filename}' is corrupt: {reason}")]
    Corrupt {
        /// The file's path.
        filename: String,
        /// Which rule, where.
        reason: String,
    },
    /// No snapshot of that tag.
    #[error("Snapshot '{tag}' does not exist on '{node}'")]
    NoSuchSnapshot {
        /// The tag asked for.
        tag: String,
        /// The node's name.
        node: String,
    },
    /// Images that change together have not all changed on disk.
    #[error(
        "Another disk was not durably taken back to its snapshot: after a crash this one might not fit it"
    )]
    Apart,
    /// The operation was cancelled through its [`crate::Progress`].
    #[error("Operation canceled")]
    Cancelled,
}

impl Error {
    /// The error as the `errno` value that a guest's or a client's protocol can tell.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Open { source, .. } | Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::WriteZero => libc::ENOSPC,
                _ => source.raw_os_error().unwrap_or(libc::EIO),
            },
            Self::Backing { source, .. } => source.errno(),
            Self::Locked { .. } => libc::EBUSY,
            Self::ReadOnly(_) => libc::EPERM,
            Self::Invalid(_) | Self::OutOfRange { .. } => libc::EINVAL,
            Self::NotSupported(_) => libc::ENOTSUP,
            Self::NoSuchSnapshot { .. } => libc::ENOENT,
            Self::Cancelled => libc::ECANCELED,
            Self::NotFormat { .. } | Self::Corrupt { .. } | Self::Apart => libc::EIO,
        }
    }
}
