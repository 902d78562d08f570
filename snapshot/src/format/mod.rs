//! The VM-state format, version 1; `docs/vm-state-format.md` is its description.
//!
//! ```text
//!  +0        header, RAM region table, section table     one checksum over all three
//!  +...      section payloads                            a checksum each, in the section table
//!  +aligned  RAM                                         placed by the region table
//! ```
//!
//! [`area`] writes and reads the part before RAM; [`ram`] says where each guest page lies.

pub mod area;
pub mod header;
pub mod ram;
pub mod section;
#[cfg(test)]
mod tests;

use crate::format::section::SectionName;

/// The format version this program writes.
pub const VERSION: u32 = 1;

/// The oldest version it reads: the one before [`VERSION`], once there is one.
pub const OLDEST_VERSION: u32 = 1;

/// Why VM state could not be written or read. Nothing was changed by finding out.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The area starts with the magic of QEMU's migration stream.
    #[error("the VM state was made by QEMU; only QEMU can load it")]
    MadeByQemu,
    /// The area starts with something else.
    #[error("the VM state is of an unknown format (it starts with {0:02x?})")]
    UnknownMagic([u8; 8]),
    /// The format version is not one this program reads.
    #[error(
        "the VM state has format version {found}; this program reads versions {OLDEST_VERSION} to {VERSION}"
    )]
    Version {
        /// The version in the header.
        found: u32,
    },
    /// The area ends before what the header tells of.
    #[error("the VM state is truncated: {what} needs {need} bytes, the snapshot has {have}")]
    Truncated {
        /// What does not fit.
        what: String,
        /// Bytes needed from the start of the area.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The header breaks a rule of the format.
    #[error("the VM-state header is damaged: {0}")]
    Header(String),
    /// A section breaks a rule of the format.
    #[error("VM-state section '{name}' is damaged: {reason}")]
    Section {
        /// Which section.
        name: SectionName,
        /// Which rule.
        reason: String,
    },
    /// Two sections have one name.
    #[error("VM-state section '{0}' is there twice")]
    Duplicate(SectionName),
    /// A section that the machine needs is not there.
    #[error("VM-state section '{0}' is missing")]
    Missing(SectionName),
    /// A section that no part of the machine reads.
    #[error("VM-state section '{0}' is unknown to this machine")]
    Unknown(SectionName),
    /// A section has a version that its reader does not know.
    #[error(
        "VM-state section '{name}' has version {found}; this program reads versions {oldest} to {newest}"
    )]
    SectionVersion {
        /// Which section.
        name: SectionName,
        /// Its version.
        found: u32,
        /// The oldest version read.
        oldest: u32,
        /// The newest version read.
        newest: u32,
    },
    /// A section's payload does not decode to the state that its reader expects.
    #[error("VM-state section '{name}' cannot be decoded: {reason}")]
    Decode {
        /// Which section.
        name: SectionName,
        /// What the decoder said.
        reason: String,
    },
    /// A section cannot be written.
    #[error("VM-state section '{name}' cannot be written: {reason}")]
    Encode {
        /// Which section.
        name: SectionName,
        /// Why.
        reason: String,
    },
    /// The guest's RAM cannot be laid out.
    #[error("RAM layout: {0}")]
    Layout(#[from] ram::LayoutError),
    /// The image could not be read.
    #[error("{what} could not be read: {source}")]
    Read {
        /// What was being read.
        what: String,
        /// What the image said.
        source: Box<block::Error>,
    },
}
