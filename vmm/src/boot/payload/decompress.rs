//! Decompression of a bzImage's payload, as Linux builds write it (`scripts/Makefile.lib`).
//!
//! Every payload ends with the size of what it holds, 4 bytes, little endian: gzip has it of its
//! own, for the others the build appends it. No more than that is ever written, whatever the
//! compressed data would go on to; address space for it is reserved at once, memory is taken as
//! it is written.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::mem::MaybeUninit;

use bzip2::bufread::BzDecoder;
use flate2::bufread::GzDecoder;
use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream;

use super::super::error::FirstBytes;
use super::{lz4, lzop};

/// Bytes of the size at the end of a payload.
const SIZE_FIELD: usize = 4;

/// No Linux kernel is larger than its 1 GiB of kernel mapping (`KERNEL_IMAGE_SIZE`).
const LARGEST_KERNEL: u64 = 1 << 30;

/// Memory that an xz or lzma decoder may take. The largest dictionary of a preset, and of any
/// kernel build, has 128 MiB or less; a header could claim 4 GiB.
const LZMA_MEMORY: u64 = 192 << 20;

/// How a payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `CONFIG_KERNEL_GZIP`
    Gzip,
    /// `CONFIG_KERNEL_XZ`
    Xz,
    /// `CONFIG_KERNEL_ZSTD`
    Zstd,
    /// `CONFIG_KERNEL_LZ4`: the legacy frame of `lz4 -l`
    Lz4,
    /// `CONFIG_KERNEL_LZMA`: the `.lzma` format
    Lzma,
    /// `CONFIG_KERNEL_BZIP2`
    Bzip2,
    /// `CONFIG_KERNEL_LZO`: an lzop file
    Lzo,
}

impl Compression {
    /// By the magic at the start of compressed data.
    #[must_use]
    pub fn detect(start: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Compression); 7] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (&lz4::MAGIC, Compression::Lz4),
            (b"\x5d\0\0", Compression::Lzma),
            (b"BZh", Compression::Bzip2),
            (&lzop::MAGIC, Compression::Lzo),
        ];
        MAGIC.into_iter().find_map(|(magic, kind)| start.starts_with(magic).then_some(kind))
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
        })
    }
}

/// Why a payload cannot be decompressed. The texts go on from "a bzImage whose xz payload".
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The decoder gave up.
    #[error("is corrupt or truncated: {0}")]
    Corrupt(#[source] io::Error),
    /// The data is not what its format says, found by our own parser.
    #[error("is corrupt: {0}")]
    Malformed(&'static str),
    /// The decompressed size does not match the one at the payload's end.
    #[error("is corrupt: it should hold {expected} bytes, but holds {}{got}",
        if got > expected { "at least " } else { "" })]
    WrongSize {
        /// By the last 4 bytes of the payload.
        expected: usize,
        /// What came out.
        got: usize,
    },
    /// It would decompress to more than the guest can use.
    #[error("would decompress to {claimed} bytes, more than the {limit} that fit the guest")]
    TooLarge {
        /// By the last 4 bytes of the payload.
        claimed: u64,
        /// The lesser of low RAM and 1 GiB.
        limit: u64,
    },
    /// The host cannot give the buffer.
    #[error("needs {0} bytes to decompress, which the host does not have")]
    NoMemory(usize),
    /// What came out is not an ELF file.
    #[error("does not hold an ELF file ({0})")]
    NotElf(FirstBytes),
}

/// Decompresses `payload` to at most `limit` bytes.
///
/// # Errors
/// The data is damaged or cut off, does not hold as many bytes as it says, or more than `limit`.
pub(super) fn decompress(
    compression: Compression,
    payload: &[u8],
    limit: u64,
) -> Result<Vec<u8>, DecodeError> {
    let (data, size) = payload
        .split_last_chunk::<SIZE_FIELD>()
        .ok_or(DecodeError::Malformed("it is too short"))?;
    let claimed = u64::from(u32::from_le_bytes(*size));
    let limit = limit.min(LARGEST_KERNEL);
    if claimed > limit {
        return Err(DecodeError::TooLarge { claimed, limit });
    }
    let expected = u32::from_le_bytes(*size) as usize;
    let mut out = Vec::new();
    // One byte more, by which a stream that goes on is noticed without the buffer growing.
    out.try_reserve_exact(expected + 1).map_err(|_| DecodeError::NoMemory(expected))?;
    prefer_huge_pages(out.spare_capacity_mut());

    match compression {
        // The size is part of the gzip trailer.
        Compression::Gzip => read_all(GzDecoder::new(payload), expected, &mut out)?,
        Compression::Xz => {
            let stream = Stream::new_stream_decoder(LZMA_MEMORY, 0);
            read_all(xz_decoder(data, stream)?, expected, &mut out)?;
        }
        Compression::Lzma => {
            let stream = Stream::new_lzma_decoder(LZMA_MEMORY);
            read_all(xz_decoder(data, stream)?, expected, &mut out)?;
        }
        Compression::Bzip2 => read_all(BzDecoder::new(data), expected, &mut out)?,
        Compression::Zstd => zstd_all(data, &mut out)?,
        Compression::Lz4 => lz4::decompress(data, expected, &mut out)?,
        Compression::Lzo => lzop::decompress(data, expected, &mut out)?,
    }
    if out.len() == expected {
        Ok(out)
    } else {
        Err(DecodeError::WrongSize { expected, got: out.len() })
    }
}

/// Asks for huge pages behind a large buffer: to fault in 16 MiB page by page takes longer than to
/// decompress a kernel of that size.
fn prefer_huge_pages(buffer: &mut [MaybeUninit<u8>]) {
    let pages = buffer.as_mut_ptr_range();
    let page = 4096;
    let start = (pages.start as usize).next_multiple_of(page);
    let end = pages.end as usize & !(page - 1);
    if start < end {
        // SAFETY: the range lies within `buffer`, which is borrowed mutably, and MADV_HUGEPAGE
        // changes how memory is backed, never what is in it. A host that refuses does no harm.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

/// Reads a decoder to its end, or one byte past `expected`.
fn read_all(decoder: impl Read, expected: usize, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let mut bounded = decoder.take(expected as u64 + 1);
    bounded.read_to_end(out).map(drop).map_err(DecodeError::Corrupt)
}

/// A decoder of liblzma that ends with its stream.
fn xz_decoder<R: BufRead>(
    data: R,
    stream: Result<Stream, liblzma::stream::Error>,
) -> Result<XzDecoder<R>, DecodeError> {
    let stream = stream.map_err(|error| DecodeError::Corrupt(error.into()))?;
    Ok(XzDecoder::new_stream(data, stream))
}

/// Decompresses in one call, straight into `out`: no window is allocated and copied from.
fn zstd_all(data: &[u8], out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let mut decoder = zstd::bulk::Decompressor::new().map_err(DecodeError::Corrupt)?;
    decoder.decompress_to_buffer(data, out).map(drop).map_err(DecodeError::Corrupt)
}
