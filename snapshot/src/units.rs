//! Sizes and conversions shared by the modules.

/// Size of a guest page in bytes; the only one x86-64 Linux has for its base pages.
pub(crate) const PAGE: u64 = 4096;

/// One mebibyte in bytes.
pub(crate) const MIB: u64 = 1 << 20;

/// A byte count as an index.
#[allow(clippy::cast_possible_truncation, reason = "the assertion excludes hosts where it could")]
pub(crate) const fn index(bytes: u64) -> usize {
    const { assert!(usize::BITS >= u64::BITS) };
    bytes as usize
}

/// `value` rounded up to a multiple of `align`, a power of two; `None` past the end of 64 bits.
pub(crate) fn align_up(value: u64, align: u64) -> Option<u64> {
    value.checked_next_multiple_of(align)
}

/// A size in the largest unit that divides it: "256 MiB".
pub(crate) fn human(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn human_uses_the_largest_whole_unit() {
        assert_eq!(human(256 << 20), "256 MiB");
        assert_eq!(human(1 << 30), "1 GiB");
        assert_eq!(human((1 << 30) + (1 << 20)), "1025 MiB");
        assert_eq!(human(513), "513 bytes");
        assert_eq!(human(0), "0 bytes");
    }
}
