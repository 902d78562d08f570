//! Compressed clusters, read only.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

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

fn unzstd(data: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    const DAMAGED: &str = "compressed cluster is damaged (zstd)";
    let mut decoder = Decoder::new().map_err(|_| "zstd decoder failed")?;
    let wanted = out.len();
    let mut input = InBuffer::around(data);
    let mut output = OutBuffer::around(out);
    while output.pos() < wanted {
        let before = (input.pos(), output.pos());
        let hint = decoder.run(&mut input, &mut output).map_err(|_| DAMAGED)?;
        if hint == 0 || (input.pos(), output.pos()) == before {
            break;
        }
    }
    if output.pos() == wanted { Ok(()) } else { Err("compressed cluster is too short (zstd)") }
}
