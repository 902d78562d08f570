//! How a file is opened.

use std::num::NonZeroU32;

/// QEMU's `locking` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// Lock where the file system can.
    #[default]
    Auto,
    /// Fail where the file system cannot lock.
    On,
    /// Do not lock.
    Off,
}

/// QEMU's `aio` option: how transfers that wait for the disk are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// By threads.
    Threads,
    /// By io_uring; by threads where the host does not allow it.
    #[default]
    IoUring,
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// All I/O bypasses the host's page cache (QEMU's `cache.direct`).
    pub direct: bool,
    /// Flushes do nothing (QEMU's `cache.no-flush`).
    pub no_flush: bool,
    /// Whether to take QEMU's image locks.
    pub locking: Locking,
    /// How a [`crate::queue::Queue`] waits for the disk.
    pub aio: Aio,
    /// Open although another process writes the image; only for read-only.
    pub force_share: bool,
    /// Most bytes that one system call is given. A host may move fewer than it was asked for at any
    /// time; this makes it do so always, for tests.
    pub transfer_limit: Option<NonZeroU32>,
}
