//! Compressed clusters, read only.

use flate2::{Decompress, FlushDecompress, Status};
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
