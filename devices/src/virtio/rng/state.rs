//! The saved state of an entropy source.

use serde::{Deserialize, Serialize};

/// An entropy source remembers nothing, and must not: two guests revived from one checkpoint must
/// not get the same bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl RngState {
    /// Version of the struct.
    pub const VERSION: u32 = 1;
}
