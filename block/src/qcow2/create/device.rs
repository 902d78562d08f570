//! A new image in a block device, which keeps its length and what it held.
//!
//! **Order of writes.** The cluster of the header is zeroed, durably, before anything else is written: a
//! header that was there must not lead to tables of the new image. All tables are written in whole
//! clusters, and clusters of data that are mapped ahead of time are zeroed, so that nothing that was
//! there shows. QEMU leaves stale data in the latter and knows no preallocation but that of tables
//! on a device.

use crate::storage::Storage;
use crate::{Error, Progress, Result};

use super::layout::Layout;

/// Bytes that are zeroed at once, so that progress is seen and a cancellation heard.
const ZERO_CHUNK: u64 = 1 << 28;

/// Makes the device no image any more, if it is large enough for the new one.
pub(super) fn begin(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let (there, needed) = (storage.len()?, layout.end());
    if there < needed {
        return Err(Error::Invalid(format!(
            "'{}' has {there} bytes, the new image needs {needed} already: use a larger device, or no preallocation",
            storage.name()
        )));
    }
    storage.write_zeroes(0, layout.cluster_size(), false)?;
    storage.flush()
}

/// Makes a range read as zeroes.
pub(super) fn zero(
    storage: &dyn Storage,
    mut at: u64,
    len: u64,
    progress: &Progress,
) -> Result<()> {
    let end = at + len;
    progress.add_total(len);
    while at < end {
        progress.check()?;
        let n = (end - at).min(ZERO_CHUNK);
        storage.write_zeroes(at, n, false)?;
        progress.advance(n);
        at += n;
    }
    Ok(())
}
