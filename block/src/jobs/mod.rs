//! Long operations on nodes that go on beside the guest: what block jobs do.
//!
//! ```text
//!   new ──> run (long, on a thread of its own) ──> commit (short)      the outcome takes effect
//!    │        │ failed, cancelled        │ another of its transaction failed
//!    │        v                          v
//!    └──────> abort ─────────────────────┘                             every node as it was
//! ```
//!
//! `new` checks everything that can be told at once and, where the operation has a point in time,
//! that is its moment. A [`Control`] tells the operation to pause, end, or go slower, and others how
//! far it is. See `docs/block-jobs.md`.

mod backup;
mod chunks;
mod commit;
mod control;
mod copy;
mod create;
mod crew;
mod mirror;
mod stream;
mod walk;

pub use backup::{Backup, BackupOptions, BitmapMode, OnCbwError, SyncMode};
pub use commit::{Commit, CommitOptions};
pub use control::{Action, Control, Finish, IoStatus, Notice, OnError, Side, Wake};
pub use create::Create;
pub use mirror::{CopyMode, Mirror, MirrorHandle, MirrorOptions};
pub use stream::{Stream, StreamOptions};

use crate::Result;

/// A long operation, up to its end.
pub trait Operation: Send {
    /// Does the work; may take hours. Rests and ends as the control says.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`], or why it cannot be done. [`Operation::abort`] is to be called.
    fn run(&mut self, control: &Control) -> Result<()>;

    /// After a successful `run`: makes the outcome take effect.
    ///
    /// # Errors
    /// Nothing took effect then; [`Operation::abort`] is to be called.
    fn commit(&mut self) -> Result<()> {
        Ok(())
    }

    /// In place of `commit`: leaves every node as it was. May follow anything but a successful `commit`.
    fn abort(&mut self) {}
}
