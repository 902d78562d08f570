//! The pattern that fills disks, files and memory, and the checksum that reports them. Both are
//! part of the protocol (`docs/guest.md`): the host computes the same.

/// The golden-ratio increment of SplitMix64.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The 64-bit word number `index` of the pattern `seed`: SplitMix64 started at `seed`, so that
/// any word can be computed alone.
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `bytes` with the pattern `seed` as it is at byte `offset`, a multiple of 8. A last,
/// partial word is cut.
pub fn fill(bytes: &mut [u8], seed: u64, offset: u64) {
    for (index, chunk) in (offset / 8..).zip(bytes.chunks_mut(8)) {
        let word = word(seed, index).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

/// Where `bytes` first differ from the pattern `seed` at byte `offset`, a multiple of 8.
pub fn first_difference(bytes: &[u8], seed: u64, offset: u64) -> Option<u64> {
    for (index, chunk) in (offset / 8..).zip(bytes.chunks(8)) {
        let word = word(seed, index).to_le_bytes();
        if let Some(at) = chunk.iter().zip(word).position(|(a, b)| *a != b) {
            return Some(index * 8 + at as u64);
        }
    }
    None
}

/// FNV-1a, 64 bits.
pub struct Sum(u64);

impl Sum {
    /// The sum of no bytes.
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Takes in more bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// The sum of all bytes taken in.
    pub fn value(&self) -> u64 {
        self.0
    }
}
