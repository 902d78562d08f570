//! How much of the disk one bit stands for.

use std::ops::Range;

use crate::{Error, Result};

/// Bytes that one bit stands for: a power of two, 512 B to 2 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granularity(u32);

impl Granularity {
    /// As QMP and the command line give it.
    ///
    /// # Errors
    /// With QEMU's text if it is not a power of two from 512 to 2 GiB.
    pub fn new(bytes: u64) -> Result<Self> {
        if bytes < 512 || !bytes.is_power_of_two() {
            return Err(Error::Invalid(
                "Granularity must be power of 2 and at least 512".to_owned(),
            ));
        }
        Self::from_bits(bytes.trailing_zeros()).ok_or_else(|| {
            Error::Invalid(format!("Granularity of {bytes} bytes is above the maximum of 2 GiB"))
        })
    }

    /// 2 to the power of `bits` (`granularity_bits` of a stored bitmap).
    pub(crate) fn from_bits(bits: u32) -> Option<Self> {
        (9..=31).contains(&bits).then_some(Self(bits))
    }

    /// What a bitmap has when none is asked for, as in QEMU: the cluster size, within 4 KiB to 64 KiB.
    pub(crate) fn default_for(cluster_size: Option<u64>) -> Self {
        Self(cluster_size.unwrap_or(65536).clamp(4096, 65536).trailing_zeros())
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// log2 of the bytes.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// Bits for a disk of `size` bytes.
    pub(crate) fn count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// The bits that a range of bytes touches.
    pub(super) fn touched(self, offset: u64, len: u64) -> Range<u64> {
        match len {
            0 => 0..0,
            _ => offset >> self.0..(offset.saturating_add(len - 1) >> self.0) + 1,
        }
    }
}
