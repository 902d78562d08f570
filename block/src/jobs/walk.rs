//! Walking over what some images of a chain have allocated.

use std::ops::RangeInclusive;

use super::{Control, OnError, Side};
use crate::{Node, Result};

/// Bytes of data worked on at once, and of zeroes.
pub(super) const PIECE: u64 = 1 << 20;
pub(super) const ZERO_PIECE: u64 = 64 << 20;

/// A part of the disk, of at most [`PIECE`] bytes of data or [`ZERO_PIECE`] of zeroes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) zero: bool,
}

/// Has `work` done on what `top` reads from the images at these depths, 1 being its own, at the control's
/// speed and with its pauses. Progress goes over the whole disk.
///
/// # Errors
/// Those of `work`, cancellation, and failed looks where `on_error` says so.
pub(super) fn pieces(
    top: &Node,
    depths: &RangeInclusive<u32>,
    (control, on_error): (&Control, OnError),
    mut work: impl FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let size = top.size();
    control.add_total(size);
    let mut at = 0;
    while at < size {
        control.rest()?;
        let status = match top.access().block_status(at, size - at) {
            Ok(status) => status,
            Err(error) => {
                control.failed(on_error, Side::Source, error)?;
                continue;
            }
        };
        for extent in status {
            let wanted = depths.contains(&extent.depth);
            let end = at + extent.len;
            while at < end {
                let most = if extent.zero { ZERO_PIECE } else { PIECE };
                let len = if wanted { most.min(end - at) } else { end - at };
                control.throttle(if wanted && !extent.zero { len } else { 0 })?;
                if wanted {
                    work(Piece { at, len, zero: extent.zero })?;
                }
                control.advance(len);
                at += len;
            }
        }
    }
    Ok(())
}
