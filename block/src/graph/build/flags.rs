//! Options that nodes inherit from those above them.

use super::super::options::{DetectZeroes, NodeOptions};
use crate::node::Node;
use crate::{Error, Result};

/// What holds for a node once what it gets from the one above is put to its own options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) read_only: bool,
    pub(crate) auto_read_only: bool,
    pub(crate) force_share: bool,
    /// Opened for reading and without locks whatever the rest says: see `activity.rs`.
    pub(crate) inactive: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    pub(crate) unmap: bool,
    pub(crate) detect_zeroes: DetectZeroes,
}

impl Flags {
    /// The flags of a node with these options below one with the flags `self`. Discard and
    /// detect-zeroes are nobody else's matter.
    pub(in crate::graph) fn with(self, options: &NodeOptions) -> Result<Self> {
        let flags = Self {
            read_only: options.read_only.unwrap_or(self.read_only),
            auto_read_only: options.auto_read_only || self.auto_read_only,
            force_share: options.force_share.unwrap_or(self.force_share),
            inactive: self.inactive,
            direct: options.direct.unwrap_or(self.direct),
            no_flush: options.no_flush.unwrap_or(self.no_flush),
            unmap: options.unmap,
            detect_zeroes: options.detect_zeroes,
        };
        if flags.force_share && !flags.read_only {
            return Err(Error::Invalid(
                "force-share=on can only be used with read-only images".to_owned(),
            ));
        }
        Ok(flags)
    }

    /// What a backing file gets.
    pub(in crate::graph) fn of_backing(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The flags of a format whose image turned out to be `read_only`, with its bytes in `file`. Of one
    /// that is inactive they tell what it will be.
    pub(super) fn of_format(self, read_only: bool, file: &Node) -> Self {
        let read_only = match self.inactive {
            true => self.read_only || file.read_only(),
            false => read_only,
        };
        Self { read_only, ..self }
    }
}
