//! The legacy lz4 frame (`lz4 -l`), which is the one Linux kernels use: the magic, then blocks of
//! a 4-byte compressed length and the data, each holding 8 MiB except the last.

use super::decompress::DecodeError;

/// 0x184c2102, little endian.
pub(super) const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// What a block holds at most, in bytes.
const BLOCK: usize = 8 << 20;

/// lz4 makes of one byte 255 at most, so a block's data says how much room it can need.
const MAX_RATIO: usize = 255;

/// Decompresses a frame to its end, writing at most `expected` bytes to `out`.
///
/// # Errors
/// The data is damaged, or a block is cut off.
pub(super) fn decompress(
    data: &[u8],
    expected: usize,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    let mut rest = data;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        rest = after;
        // Frames may follow one another.
        if *length == MAGIC {
            continue;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let block = after.get(..length).ok_or(DecodeError::Malformed("an lz4 block is cut off"))?;
        rest = &after[length..];

        let start = out.len();
        let room = BLOCK.min(expected - start).min(length.saturating_mul(MAX_RATIO));
        out.resize(start + room, 0);
        let written = lz4_flex::block::decompress_into(block, &mut out[start..])
            .map_err(|error| DecodeError::Corrupt(std::io::Error::other(error)))?;
        out.truncate(start + written);
    }
    if rest.is_empty() { Ok(()) } else { Err(DecodeError::Malformed("an lz4 block is cut off")) }
}
