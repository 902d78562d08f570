//! A machine's state as a stream: `docs/migration.md` has the format.
//!
//! The sections are those of the VM-state format; RAM comes page by page, in any order, a page as often
//! as it changes while the guest runs. The writer needs no seek and the reader none: every frame can
//! be applied as it comes. What is read is believed only as far as its checksum and the rules go.

mod frame;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::io;

use serde::{Deserialize, Serialize};

use crate::format::FormatError;
use crate::format::section::SectionName;

pub use read::{Received, StreamReader};
pub use write::{Sent, StreamWriter};

/// First bytes of a stream. The last one makes a text tool stop.
const MAGIC: [u8; 8] = *b"TARDMIG\x1a";
/// The version that is written, and the only one that is read: there is none before it.
const VERSION: u32 = 1;
/// Most pages in a frame.
const FRAME_PAGES: u64 = 64;
/// Kind of the section that tells what the source was doing.
const RUN_KIND: &str = "run";
/// Version of its payload.
const RUN_VERSION: u32 = 1;

/// Payload of `run.0`.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    /// QMP's name of the run state.
    state: String,
}

/// Why a stream could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Where it goes does not take it.
    #[error("the migration stream could not be written: {0}")]
    Write(io::Error),
    /// Where it comes from gives an error.
    #[error("the migration stream could not be read: {0}")]
    Read(io::Error),
    /// It starts with something else.
    #[error("this is no migration stream (it starts with {0:02x?})")]
    UnknownMagic([u8; 8]),
    /// QEMU made it.
    #[error("the migration stream was made by QEMU; only QEMU can load it")]
    MadeByQemu,
    /// Its version is not one this program reads.
    #[error("the migration stream has version {0}; this program reads version {VERSION}")]
    Version(u32),
    /// It ends before its end.
    #[error("the migration stream ends after {0} bytes, in the middle")]
    Truncated(u64),
    /// A rule of the format is broken.
    #[error("the migration stream is damaged at byte {at}: {reason}")]
    Damaged {
        /// Where the frame starts.
        at: u64,
        /// Which rule.
        reason: String,
    },
    /// It has more frames than can be counted.
    #[error("the migration stream is too long")]
    TooLong,
    /// A section cannot be used.
    #[error(transparent)]
    Section(#[from] FormatError),
    /// A section came twice.
    #[error("section '{0}' of the migration stream is there twice")]
    Twice(SectionName),
    /// The RAM of the machine that was sent is laid out in another way.
    #[error("the migration stream is of a machine with other RAM regions")]
    Regions,
}
