//! The bytes the agent writes and the sums it tells; `docs/guest.md` defines both.

/// Word `k` of the pattern of `seed`: SplitMix64.
pub fn word(seed: u64, k: u64) -> u64 {
    let mut z = seed.wrapping_add((k + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What `pattern` leaves in `len` bytes at `offset` of a device; both are multiples of 8.
pub fn bytes(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let first = offset / 8;
    (first..first + len as u64 / 8).flat_map(|k| word(seed, k).to_le_bytes()).collect()
}

/// FNV-1a with 64 bits, as the agent's `sum` tells it.
pub fn sum(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_fnv_1a() {
        // Published test vectors of FNV-1a, 64 bits.
        assert_eq!(sum(b""), "cbf29ce484222325");
        assert_eq!(sum(b"foobar"), "85944171f73967e8");
    }

    #[test]
    fn the_pattern_is_splitmix64() {
        // The first outputs of SplitMix64 with seed 1234567, from its reference implementation.
        assert_eq!(word(1_234_567, 0), 6_457_827_717_110_365_317);
        assert_eq!(word(1_234_567, 1), 3_203_168_211_198_807_973);
    }
}
