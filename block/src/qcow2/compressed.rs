//! Packing and unpacking of compressed clusters.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{DCtx, find_frame_compressed_size};

use super::header::Compression;

/// Unpacks one cluster into `out`, which is one cluster long.
///
/// `data` may have bytes of other clusters behind the stream; a stream that is longer than a
/// cluster is cut, one that is shorter is an error.
pub(super) fn decompress(
    method: Compression,
    data: &[u8],
    out: &mut [u8],
) -> Result<(), &'static str> {
    match method {
        Compression::Zlib => inflate(data, out),
        Compression::Zstd => unzstd(data, out),
    }
}

fn inflate(data: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    let mut stream = Decompress::new(false);
    let wanted = out.len() as u64;
    let status = stream
        .decompress(data, out, FlushDecompress::Finish)
        .map_err(|_| "compressed cluster is damaged (deflate)")?;
    match status {
        // The output may be full before the end mark was read.
        Status::StreamEnd | Status::Ok | Status::BufError if stream.total_out() == wanted => Ok(()),
        _ => Err("compressed cluster is too short (deflate)"),
    }
}

/// Frame by frame, straight into `out`: a streaming decoder would take as much memory for its window
/// as a frame claims (up to 128 MiB).
fn unzstd(data: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    const DAMAGED: &str = "compressed cluster is damaged (zstd)";
    let mut decoder = DCtx::create();
    let (mut rest, mut done) = (data, 0);
    while done < out.len() {
        if rest.is_empty() {
            return Err("compressed cluster is too short (zstd)");
        }
        let len = find_frame_compressed_size(rest).map_err(|_| DAMAGED)?;
        let (frame, behind) = rest.split_at_checked(len).ok_or(DAMAGED)?;
        done += decoder.decompress(&mut out[done..], frame).map_err(|_| DAMAGED)?;
        rest = behind;
    }
    Ok(())
}

/// Packs one cluster into `out`, which is shorter than a cluster; gives the length. `None` if it does
/// not shrink enough to fit.
pub(super) fn compress(method: Compression, data: &[u8], out: &mut [u8]) -> Option<usize> {
    /// Readers inflate with a window of 4 KiB ("Compressed Clusters Descriptor").
    const WINDOW_BITS: u8 = 12;
    match method {
        Compression::Zlib => {
            let level = flate2::Compression::default();
            let mut stream = Compress::new_with_window_bits(level, false, WINDOW_BITS);
            match stream.compress(data, out, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => usize::try_from(stream.total_out()).ok(),
                _ => None,
            }
        }
        // An error is that of lack of room: there is nothing else that could fail.
        Compression::Zstd => {
            zstd::zstd_safe::compress(out, data, zstd::DEFAULT_COMPRESSION_LEVEL).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn zstd_frames_in_a_row_with_other_bytes_behind_are_unpacked() {
        let mut data = zstd::encode_all(&[1; 3000][..], 3).unwrap();
        data.extend(zstd::encode_all(&[2; 1096][..], 3).unwrap());
        let whole = data.len();
        data.extend([0xee; 500]);
        let mut out = vec![0; 4096];
        decompress(Compression::Zstd, &data, &mut out).unwrap();
        assert!(out[..3000].iter().all(|b| *b == 1) && out[3000..].iter().all(|b| *b == 2));
        for cut in [0, 1, whole / 2, whole - 1] {
            decompress(Compression::Zstd, &data[..cut], &mut out).unwrap_err();
        }
    }

    #[test]
    fn what_is_packed_is_unpacked_and_what_does_not_shrink_is_refused() {
        for method in [Compression::Zlib, Compression::Zstd] {
            for len in [512, 65536, 2 << 20] {
                let data: Vec<u8> = (0..251u8).cycle().flat_map(|n| [n; 300]).take(len).collect();
                let mut packed = vec![0; len - 1];
                let n = compress(method, &data, &mut packed).unwrap();
                assert!(n < len / 2);
                let mut out = vec![0; len];
                decompress(method, &packed[..n], &mut out).unwrap();
                assert!(out == data, "{method:?} {len}");
            }
            let mut state = 1u32;
            let noise = std::iter::repeat_with(|| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            });
            let noise: Vec<u8> = noise.take(4096).collect();
            assert_eq!(compress(method, &noise, &mut [0; 4095]), None, "{method:?}");
        }
    }

    #[test]
    fn a_zstd_window_of_any_size_takes_no_memory() {
        // The format's largest window is far more than a decoder would take for it.
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(30).unwrap();
        encoder.include_contentsize(false).unwrap();
        encoder.write_all(&[5; 4096]).unwrap();
        let data = encoder.finish().unwrap();
        let mut out = vec![0; 4096];
        decompress(Compression::Zstd, &data, &mut out).unwrap();
        assert!(out.iter().all(|b| *b == 5));
    }
}
