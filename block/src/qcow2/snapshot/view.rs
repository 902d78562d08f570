//! Showing the disk as it was at a snapshot, in an image that is opened read-only for that.

use crate::num::to_usize;
use crate::qcow2::meta::Meta;
use crate::{Error, Result};

use super::{find, load_l1};

/// Has the image's disk be that of snapshot `id`, which has this `date` if one is given; gives its size
/// in bytes. Nothing on disk changes, and the image cannot be written to: nobody may take the snapshot's
/// tables for the active ones.
pub(in crate::qcow2) fn view(meta: &mut Meta, id: &str, date: Option<&str>) -> Result<u64> {
    if meta.writable {
        return Err(Error::Invalid(
            "'x-snapshot-id' shows a snapshot, which is possible with read-only=on only".to_owned(),
        ));
    }
    let entry = find(meta, id)?;
    let (found, image) = (entry.info.date_text(), meta.storage.name());
    if let Some(date) = date.filter(|date| *date != found) {
        return Err(Error::Invalid(format!(
            "Image '{image}': the snapshot of {date} that had id '{id}' was deleted; it is the id of '{}' of \
             {found} now",
            entry.info.tag
        )));
    }
    let mut l1 = load_l1(meta, &entry)?;
    let size = entry.info.disk_size;
    // What comes after the disk is VM state.
    let count = meta.geometry().l1_entries(size);
    l1.truncate(to_usize(count));
    meta.replace_l1(l1, entry.l1_offset, u32::try_from(count).unwrap_or(u32::MAX));
    meta.header.size = size;
    Ok(size)
}
