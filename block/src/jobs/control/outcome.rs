//! What becomes of an operation, and of its errors.

/// What is done about a failed read or write: QMP's `BlockdevOnError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The operation fails.
    #[default]
    Report,
    /// The piece is tried again.
    Ignore,
    /// The operation rests, and tries again when it is resumed.
    Stop,
    /// As `Stop` where space ran out, else as `Report`.
    Enospc,
}

/// What was done about it: QMP's `BlockErrorAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The operation fails.
    Report,
    /// The piece is tried again.
    Ignore,
    /// The operation rests.
    Stop,
}

/// Which side of a copy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What is read.
    Source,
    /// What is written.
    Target,
}

/// What watchers are told, by the operation's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// It rests after [`Control::pause`] and does nothing until [`Control::resume`].
    Paused,
    /// Source and target are the same, and are kept so until [`Control::complete`].
    Ready,
    /// A read or write failed. After [`Action::Stop`] it rests as if paused.
    Error {
        /// Whether it was a read.
        read: bool,
        /// What is done about it.
        action: Action,
        /// Whether space ran out.
        nospace: bool,
    },
}

/// The last failure that stopped the operation: QMP's `BlockDeviceIoStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// None, or it was resumed since.
    #[default]
    Ok,
    /// Space ran out.
    NoSpace,
    /// Anything else.
    Failed,
}

/// How an operation that is ready is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// Its outcome takes effect: the target takes the source's place.
    Complete,
    /// The copy is left as it is at that moment, and the source in its place.
    Leave,
}

/// Why [`Control::idle`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// There is work.
    Work,
    /// It is to end.
    Finish(Finish),
}
