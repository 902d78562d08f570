//! What an open image reports about itself.

use super::Qcow2;
use super::header::{Compression, compatible, incompatible};

/// What `query-named-block-nodes` tells of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Info {
    /// "0.10" for version 2, "1.1" for version 3.
    pub compat: &'static str,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Whether the image asks for lazy refcounts.
    pub lazy_refcounts: bool,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether the image is marked as corrupt.
    pub corrupt: bool,
    /// Whether the image was not closed properly.
    pub dirty: bool,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// External data file as the image has it.
    pub data_file: Option<String>,
    /// Whether the external data file is kept as a raw image; `None` without one.
    pub data_file_raw: Option<bool>,
    /// Backing file as the image has it.
    pub backing_file: Option<String>,
    /// Backing file's format as the image has it.
    pub backing_format: Option<String>,
}

impl Qcow2 {
    /// What the header tells.
    pub fn info(&self) -> Qcow2Info {
        let meta = self.meta();
        let header = &meta.header;
        Qcow2Info {
            compat: if header.geometry.version < 3 { "0.10" } else { "1.1" },
            compression: header.compression,
            lazy_refcounts: header.compatible & compatible::LAZY != 0,
            refcount_bits: 1 << header.geometry.refcount_order,
            corrupt: header.incompatible & incompatible::CORRUPT != 0,
            dirty: header.incompatible & incompatible::DIRTY != 0,
            cluster_size: header.geometry.cluster_size(),
            extended_l2: header.geometry.extended,
            data_file: header.data_file(),
            data_file_raw: header.geometry.external.then_some(self.raw_data),
            backing_file: header.backing_file.clone(),
            backing_format: header.backing_format.clone(),
        }
    }
}
