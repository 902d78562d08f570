//! Serving requests for entropy.

use std::io;

use vm_memory::{Address, Bytes};

use crate::GuestMemory;
use crate::virtio::chain::{Chain, Malformed, out_of_memory};
use crate::virtio::{QueueHandler, Served, Token};

/// Bytes given to one request at most. Giving fewer than asked is allowed (section 5.4.6.2).
pub(crate) const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Bytes taken from the host at once; getrandom gives up to 256 without being interrupted.
const PIECE: usize = 256;

pub(super) struct RngHandler;

impl QueueHandler for RngHandler {
    fn start(&mut self, _features: u64) {}

    fn serve(
        &mut self,
        _token: Token,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<Served, Malformed> {
        let mut given = 0;
        for segment in chain.writable.segments() {
            let mut done = 0;
            while done < segment.len as usize && given < MAX_REQUEST_BYTES {
                let mut piece = [0; PIECE];
                let count = PIECE.min(segment.len as usize - done).min(MAX_REQUEST_BYTES - given);
                let piece = &mut piece[..count];
                if let Err(error) = random(piece) {
                    tracing::error!(%error, "no entropy from the host");
                    return Ok(Served::Done(length(given)));
                }
                mem.write_slice(piece, segment.addr.unchecked_add(done as u64))
                    .map_err(|_| out_of_memory(segment.addr, segment.len))?;
                done += count;
                given += count;
            }
        }
        Ok(Served::Done(length(given)))
    }

    fn flush(&mut self) -> ::block::Result<()> {
        Ok(())
    }
}

fn length(given: usize) -> u32 {
    // At most MAX_REQUEST_BYTES.
    u32::try_from(given).unwrap_or(u32::MAX)
}

fn random(buf: &mut [u8]) -> io::Result<()> {
    let mut rest = buf;
    while !rest.is_empty() {
        // SAFETY: the pointer and the length are those of one slice that we may write.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => rest = rest.get_mut(got..).unwrap_or_default(),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
