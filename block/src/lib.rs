//! Disk images and what is done to them.
//!
//! A [`Node`] is one named image (QEMU's block node). Below it a [`Format`] gives meaning to the
//! bytes (`raw`, `qcow2`), and below that a storage holds them. This crate knows nothing of KVM,
//! guest memory or QMP: requests come as offsets and [`iobuf`] buffers.

pub mod bitmap;
pub mod compress;
mod create_file;
pub mod error;
pub mod format;
pub mod graph;
pub mod iobuf;
pub mod jobs;
mod lock;
mod magic;
pub mod nbd;
pub mod node;
mod num;
pub mod perm;
mod preallocation;
pub mod progress;
pub mod qcow2;
pub mod queue;
pub mod raw;
pub mod snapshot;
mod stack;
pub mod status;
pub mod storage;
mod sync;
pub mod throttle;
mod together;

pub use create_file::{DEFAULT_EXTENT_SIZE, FileCreateOptions, FileHints, create_file, create_raw};
pub use error::{Error, Result, host_words};
pub use format::Format;
pub use graph::{Attachment, Graph, NodeInfo, User};
pub use iobuf::{ReadBuf, WriteBuf};
pub use magic::probe_format;
pub use node::{
    Access, Change, ChangeKind, Entered, Interceptor, Link, Node, Occupied, Saving, Turn,
    WriteObserver,
};
pub use perm::{Perm, Permissions};
pub use preallocation::Preallocation;
pub use progress::Progress;
pub use snapshot::{
    DiskRead, NewSnapshot, SnapshotChange, SnapshotCreate, SnapshotInfo, SnapshotSizes, VmStateRead,
};
pub use status::StatusExtent;
pub use throttle::Throttle;
pub use together::Together;
