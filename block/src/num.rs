//! Conversions between the sizes of files (`u64`) and of memory (`usize`).

/// A length that is known to fit memory. The crate is for 64-bit hosts, where every `u64` does.
#[cfg(target_pointer_width = "64")]
#[expect(clippy::cast_possible_truncation, reason = "usize is 64 bits wide, see the cfg")]
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A memory length as a file length.
pub(crate) const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// The big-endian u64 at `index * 8`; 0 where the slice ends before it.
pub(crate) fn be64(bytes: &[u8], index: usize) -> u64 {
    bytes
        .get(index * 8..index * 8 + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

/// The big-endian u32 at byte `at`; 0 where the slice ends before it.
pub(crate) fn be32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// The big-endian u64 at byte `at`; 0 where the slice ends before it.
pub(crate) fn be64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// The big-endian u16 at byte `at`; 0 where the slice ends before it.
pub(crate) fn be16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

/// Table entries as they are on disk, big-endian.
pub(crate) fn be_bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}
