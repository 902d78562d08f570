//! The saved state of a disk, apart from its contents.

use serde::{Deserialize, Serialize};

/// What the guest was told of its disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors of 512 bytes.
    pub capacity: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Serial number.
    pub serial: String,
}

impl BlockState {
    /// Version of the struct.
    pub const VERSION: u32 = 1;
}
