//! The lzop file format, as `lzop -9` of a kernel build writes it. All numbers are big endian.

use flate2::Crc;

use super::decompress::DecodeError;

/// The magic of an lzop file.
pub(super) const MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0, 0x0d, 0x0a, 0x1a, 0x0a];

/// Files of this version or a later one have three fields more in their header.
const LONG_HEADER_VERSION: u16 = 0x0940;

/// lzop's own limit for the size of a block, in bytes.
const MAX_BLOCK: usize = 64 << 20;

/// LZO1X makes of one byte 255 at most, and of a short block not much more.
const MAX_RATIO: usize = 256;

/// LZO1X compression; its levels differ in the compressor only.
const METHODS: std::ops::RangeInclusive<u8> = 1..=3;

/// Bits of the header's flags.
mod flag {
    /// Each block has the Adler-32 of its plain data.
    pub(super) const ADLER32_PLAIN: u32 = 0x1;
    /// Each compressed block has the Adler-32 of its compressed data.
    pub(super) const ADLER32_COMPRESSED: u32 = 0x2;
    /// A field of arbitrary length follows the header.
    pub(super) const EXTRA_FIELD: u32 = 0x40;
    /// Each block has the CRC-32 of its plain data.
    pub(super) const CRC32_PLAIN: u32 = 0x100;
    /// Each compressed block has the CRC-32 of its compressed data.
    pub(super) const CRC32_COMPRESSED: u32 = 0x200;
    /// The data went through a filter before compression; kernels never do.
    pub(super) const FILTER: u32 = 0x800;
}

/// Decompresses a file to its end mark, writing at most `expected` bytes to `out`.
///
/// # Errors
/// The data is damaged or cut off, or compressed with something other than LZO1X.
pub(super) fn decompress(
    data: &[u8],
    expected: usize,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    let mut input = Input(data);
    let flags = header(&mut input)?;
    loop {
        let plain = input.u32()? as usize;
        if plain == 0 {
            return Ok(());
        }
        let compressed = input.u32()? as usize;
        if plain > MAX_BLOCK || compressed > plain || plain / MAX_RATIO > compressed {
            return Err(DecodeError::Malformed("an lzo block has impossible sizes"));
        }
        let start = out.len();
        if plain > expected - start {
            return Err(DecodeError::WrongSize { expected, got: start + plain });
        }
        let adler32 = input.checksum(flags & flag::ADLER32_PLAIN != 0)?;
        let crc32 = input.checksum(flags & flag::CRC32_PLAIN != 0)?;
        // Those of the compressed data are there only if the block is not stored as it is.
        let packed = compressed < plain;
        input.checksum(packed && flags & flag::ADLER32_COMPRESSED != 0)?;
        input.checksum(packed && flags & flag::CRC32_COMPRESSED != 0)?;
        let block = input.take(compressed)?;
        if packed {
            out.resize(start + plain, 0);
            lzo1x::decompress(block, &mut out[start..])
                .map_err(|error| DecodeError::Corrupt(std::io::Error::other(error)))?;
        } else {
            out.extend_from_slice(block);
        }
        verify(&out[start..], adler32, crc32)?;
    }
}

/// Reads the header behind and with the magic; its flags.
fn header(input: &mut Input<'_>) -> Result<u32, DecodeError> {
    input.take(MAGIC.len())?;
    let version = input.u16()?;
    let _library_version = input.u16()?;
    let long = version >= LONG_HEADER_VERSION;
    if long {
        let _version_needed = input.u16()?;
    }
    if !METHODS.contains(&input.u8()?) {
        return Err(DecodeError::Malformed("it is not compressed with LZO1X"));
    }
    if long {
        let _level = input.u8()?;
    }
    let flags = input.u32()?;
    if flags & flag::FILTER != 0 {
        return Err(DecodeError::Malformed("it uses an lzop filter, which no kernel does"));
    }
    let _mode = input.u32()?;
    let _modification_time_low = input.u32()?;
    if long {
        let _modification_time_high = input.u32()?;
    }
    let name_length = usize::from(input.u8()?);
    input.take(name_length)?;
    let _header_checksum = input.u32()?;
    if flags & flag::EXTRA_FIELD != 0 {
        let length = input.u32()? as usize;
        input.take(length)?;
        let _extra_field_checksum = input.u32()?;
    }
    Ok(flags)
}

/// Compares the plain data of a block with the checksums that the file has for it.
fn verify(plain: &[u8], adler: Option<u32>, crc: Option<u32>) -> Result<(), DecodeError> {
    let crc_matches = crc.is_none_or(|wanted| {
        let mut crc = Crc::new();
        crc.update(plain);
        crc.sum() == wanted
    });
    if crc_matches && adler.is_none_or(|wanted| adler32(plain) == wanted) {
        Ok(())
    } else {
        Err(DecodeError::Malformed("the checksum of an lzo block does not match"))
    }
}

/// Adler-32 as in RFC 1950, section 8.2, from a start value of 1.
pub(in crate::boot) fn adler32(data: &[u8]) -> u32 {
    const MODULUS: u32 = 65521;
    /// As many bytes as cannot overflow 32 bits before the remainder is taken.
    const RUN: usize = 5552;
    let (mut low, mut high) = (1, 0);
    for run in data.chunks(RUN) {
        for &byte in run {
            low += u32::from(byte);
            high += low;
        }
        low %= MODULUS;
        high %= MODULUS;
    }
    (high << 16) | low
}

/// What is left to read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(DecodeError::Malformed("the lzo data is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn checksum(&mut self, there: bool) -> Result<Option<u32>, DecodeError> {
        there.then(|| self.u32()).transpose()
    }
}
