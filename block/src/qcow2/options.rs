//! How an image is to be opened: QMP's `BlockdevOptionsQcow2`.

use std::sync::Arc;

use crate::storage::Storage;

use super::overlap::OverlapCheck;

/// What the opener says beyond what the image says.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Refuse writes.
    pub read_only: bool,
    /// Which metadata writes are checked against.
    pub overlap_check: OverlapCheck,
    /// Where the data clusters are, if the image has an external data file.
    pub data_file: Option<Arc<dyn Storage>>,
    /// Defer refcount updates under the dirty bit; `None`: as the image says.
    pub lazy_refcounts: Option<bool>,
    /// Bytes of L2 tables kept in memory; `None`: the default.
    pub l2_cache: Option<u64>,
    /// Bytes of refcount blocks kept in memory; `None`: the default.
    pub refcount_cache: Option<u64>,
}
