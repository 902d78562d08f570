//! Puts COPIED flags right.

use crate::num::{be_bytes, be64, to_u64, to_usize};
use crate::{Progress, ReadBuf, Result, WriteBuf};

use super::super::counts::Counts;
use super::super::entry::{self, COPIED};
use super::super::image::Image;

/// Which flags are changed. A flag says that a cluster may be written in place, so one that is
/// wrong is taken away before counts change, and one that is missing is set after the counts are
/// durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Clear,
    Set,
}

impl Change {
    /// The entry with the flag as it should be.
    fn apply(self, entry: u64, references: u64) -> u64 {
        match self {
            Self::Clear if references != 1 => entry & !COPIED,
            Self::Set if references == 1 => entry | COPIED,
            _ => entry,
        }
    }
}

/// Changes the flags of the active disk: `tables` are its L2 tables. Each table is written once, as
/// far as it changes; an entry is as good in a torn write as before or after.
pub(super) fn correct(
    image: &Image<'_>,
    counts: &Counts,
    tables: &[u64],
    change: Change,
    progress: &Progress,
) -> Result<()> {
    let references = |at: u64| counts.get(at >> image.cluster_bits);
    let mut l1 = be_bytes(&image.read_table(image.l1_offset, image.l1_size.into())?);
    rewrite(image, image.l1_offset, &mut l1, 8, |entry| {
        let at = entry & entry::OFFSET;
        if at == 0 { entry } else { change.apply(entry, references(at)) }
    })?;
    let mut bytes = vec![0; to_usize(image.cluster_size())];
    for at in tables {
        progress.check()?;
        image.storage.read_at(*at, &[ReadBuf::new(&mut bytes)])?;
        rewrite(image, *at, &mut bytes, image.l2_entry_len(), |entry| {
            match entry::flagged(image, entry) {
                Some(_) if image.data_file() => change.apply(entry, 1),
                Some(host) => change.apply(entry, references(host)),
                None => entry,
            }
        })?;
    }
    Ok(())
}

/// Changes the first word of each entry of a table, on disk too.
fn rewrite(
    image: &Image<'_>,
    at: u64,
    bytes: &mut [u8],
    entry_len: usize,
    mut change: impl FnMut(u64) -> u64,
) -> Result<()> {
    let mut changed: Option<std::ops::Range<usize>> = None;
    for (index, entry) in bytes.chunks_exact_mut(entry_len).enumerate() {
        let old = be64(entry, 0);
        let new = change(old);
        if new != old {
            entry[..8].copy_from_slice(&new.to_be_bytes());
            let start = index * entry_len;
            changed = Some(changed.map_or(start, |c| c.start)..start + 8);
        }
    }
    if let Some(range) = changed {
        let place = at + to_u64(range.start);
        image.storage.write_at(place, &[WriteBuf::new(&bytes[range])])?;
    }
    Ok(())
}
