//! Dirty bitmaps: which parts of a node were written since some moment.
//!
//! ```text
//!   Node::note_write ──> BitmapSet ──> Bitmap ──> Bits (memory goes with what is dirty)
//!                            │
//!              qcow2::bitmaps: read at open, stored at close
//! ```
//!
//! A write is noted when it has ended, however it ended, and before anybody is told: a bitmap that
//! is cleared while the write is in flight has it afterwards, so what was cleared away was on disk
//! before. A crash in between is no concern of memory: what the image has on disk counts as out
//! of date from before the first write (see `qcow2::bitmaps`).
//!
//! Locks: the list of a set, then one bitmap; both for memory only, never over I/O.

mod bits;
mod commands;
mod dirty;
mod granularity;
mod set;
mod undo;

pub(crate) use bits::Bits;
pub use commands::NewBitmap;
pub use dirty::{Bitmap, BitmapHold, BitmapInfo, Extent};
pub(crate) use dirty::{Start, Stored};
pub use granularity::Granularity;
pub use set::BitmapSet;
pub use undo::BitmapUndo;
