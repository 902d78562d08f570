//! `BlockdevOptions` of QMP, read from JSON or from the command line's `key=value` text.
//!
//! Every member is looked at: one that does not exist is an error, and so is one that exists in
//! QEMU but is not done here. None is ignored.

use std::time::Duration;

use crate::qcow2::{self, OverlapCheck, PassDiscard};
use crate::storage::{Aio, Locking};

mod members;
mod parse;

pub use members::{Members, Source};

/// The options of one node, and of those that are opened with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeOptions {
    pub(crate) node_name: Option<String>,
    /// `None`: as the parent.
    pub(crate) read_only: Option<bool>,
    pub(crate) auto_read_only: bool,
    /// `None`: as the parent.
    pub(crate) force_share: Option<bool>,
    /// `None`: as the parent.
    pub(crate) direct: Option<bool>,
    /// `None`: as the parent.
    pub(crate) no_flush: Option<bool>,
    /// Whether discards reach the image.
    pub(crate) unmap: bool,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) driver: Driver,
}

/// What is done with writes of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are writes like others.
    #[default]
    Off,
    /// They become zero clusters.
    On,
    /// They give their space back.
    Unmap,
}

impl DetectZeroes {
    /// QMP's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }
}

/// The part of a file that a raw node shows, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Window {
    pub(crate) offset: Option<u64>,
    pub(crate) size: Option<u64>,
}

impl Window {
    /// Whether it is the whole file.
    pub(crate) fn is_whole(self) -> bool {
        self.offset.unwrap_or(0) == 0 && self.size.is_none()
    }
}

/// What is particular to a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Driver {
    File {
        filename: String,
        locking: Locking,
        aio: Aio,
        host_device: bool,
    },
    Raw {
        file: NodeRef,
        window: Window,
    },
    Qcow2 {
        file: NodeRef,
        backing: Backing,
        image: ImageOptions,
    },
    /// What is written through it is compressed.
    Compress {
        file: NodeRef,
    },
}

/// What is particular to a qcow2 image. `None` is the default of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ImageOptions {
    /// Which metadata writes are checked against.
    pub(crate) overlap_check: Option<OverlapCheck>,
    /// The external data file; by default the one that the image names.
    pub(crate) data_file: Option<NodeRef>,
    pub(crate) lazy_refcounts: Option<bool>,
    pub(crate) cache: Option<u64>,
    pub(crate) l2_cache: Option<u64>,
    pub(crate) l2_cache_entry: Option<u64>,
    pub(crate) refcount_cache: Option<u64>,
    /// In seconds.
    pub(crate) cache_clean_interval: Option<u64>,
    pub(crate) pass_discard_request: Option<bool>,
    pub(crate) pass_discard_snapshot: Option<bool>,
    pub(crate) pass_discard_other: Option<bool>,
    pub(crate) discard_no_unref: Option<bool>,
    /// Id of the internal snapshot that is shown.
    pub(crate) snapshot: Option<String>,
    /// The date that it must have.
    pub(crate) snapshot_date: Option<String>,
}

impl ImageOptions {
    /// For the format.
    pub(crate) fn to_options(&self) -> qcow2::Options {
        qcow2::Options {
            read_only: false,
            data_file: None,
            overlap_check: self.overlap_check.unwrap_or_default(),
            lazy_refcounts: self.lazy_refcounts,
            cache: self.cache,
            l2_cache: self.l2_cache,
            l2_cache_entry: self.l2_cache_entry,
            refcount_cache: self.refcount_cache,
            cache_clean_interval: self.cache_clean_interval.map(Duration::from_secs),
            pass_discard: PassDiscard {
                request: self.pass_discard_request.unwrap_or(true),
                snapshot: self.pass_discard_snapshot.unwrap_or(true),
                other: self.pass_discard_other.unwrap_or(true),
            },
            discard_no_unref: self.discard_no_unref.unwrap_or(false),
            snapshot: self.snapshot.clone(),
            snapshot_date: self.snapshot_date.clone(),
        }
    }
}

/// A node that exists, or one to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NodeRef {
    Name(String),
    Inline(Box<NodeOptions>),
}

/// QMP's `backing`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Backing {
    /// What the image says.
    FromImage,
    /// `null`: none, whatever the image says.
    None,
    Node(NodeRef),
}

impl Driver {
    /// Its name in QMP.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::File { host_device: false, .. } => "file",
            Self::File { host_device: true, .. } => "host_device",
            Self::Raw { .. } => "raw",
            Self::Qcow2 { .. } => "qcow2",
            Self::Compress { .. } => "compress",
        }
    }
}

impl NodeOptions {
    /// Options that say nothing but the driver.
    pub(crate) fn of_driver(driver: Driver) -> Self {
        Self {
            node_name: None,
            read_only: None,
            auto_read_only: false,
            force_share: None,
            direct: None,
            no_flush: None,
            unmap: false,
            detect_zeroes: DetectZeroes::Off,
            driver,
        }
    }
}

/// Whether QEMU takes a name for a node, a job or an export.
pub fn is_well_formed(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

#[cfg(test)]
mod tests;
