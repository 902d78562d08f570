//! Mends the snapshot table by writing a new one: entries that lack data get it, those that break a
//! limit are cut, snapshots whose L1 table is lost are left out.

use std::collections::BTreeSet;

use crate::num::{be16_at, be32_at, be64_at, to_u64, to_usize};
use crate::qcow2::header::field;
use crate::{Result, WriteBuf};

use super::super::image::Image;
use super::super::report::Report;
use super::super::snapshots::{
    FIXED, MAX_EXTRA, MAX_SNAPSHOTS, MAX_TABLE, NEEDED_EXTRA, SnapshotL1,
};
use super::append::Append;

/// An entry with all its bytes.
struct Raw {
    fixed: Vec<u8>,
    extra: Vec<u8>,
    names: Vec<u8>,
}

impl Raw {
    fn l1(&self) -> SnapshotL1 {
        SnapshotL1 { offset: be64_at(&self.fixed, 0), entries: be32_at(&self.fixed, 8) }
    }

    /// The tag, for messages.
    fn tag(&self) -> String {
        let id = usize::from(be16_at(&self.fixed, 12));
        String::from_utf8_lossy(self.names.get(id..).unwrap_or_default()).into_owned()
    }
}

/// Whether the table can be read in part at least.
fn readable(image: &Image<'_>) -> bool {
    let count = u64::from(image.snapshots).min(MAX_SNAPSHOTS);
    image.check_table("", image.snapshots_offset, count * FIXED, u64::MAX).is_ok()
        && image.snapshots_offset != 0
}

/// The L1 tables of all snapshots, also of those past a limit of the table.
pub(super) fn l1_tables(image: &Image<'_>) -> Result<Vec<SnapshotL1>> {
    if image.snapshots == 0 || !readable(image) {
        return Ok(Vec::new());
    }
    Ok(read(image)?.0.iter().map(Raw::l1).collect())
}

/// The entries, and whether a limit or rule of the table asks for a new one.
fn read(image: &Image<'_>) -> Result<(Vec<Raw>, bool)> {
    let start = image.snapshots_offset;
    let count = u64::from(image.snapshots).min(MAX_SNAPSHOTS);
    let mut change = count < image.snapshots.into();
    let (mut entries, mut at) = (Vec::new(), start);
    for _ in 0..count {
        at = at.next_multiple_of(8);
        let fixed = image.read_part(at, FIXED)?;
        if to_u64(fixed.len()) < FIXED {
            return Ok((entries, true));
        }
        let extra_len = u64::from(be32_at(&fixed, 36));
        let names_len = u64::from(be16_at(&fixed, 12)) + u64::from(be16_at(&fixed, 14));
        let extra = image.read_part(at + FIXED, extra_len.min(MAX_EXTRA.into()))?;
        let names = image.read_part(at + FIXED + extra_len, names_len)?;
        change |= extra_len > MAX_EXTRA.into()
            || (image.version >= 3 && extra_len < NEEDED_EXTRA.into())
            || to_u64(names.len()) < names_len;
        at += FIXED + extra_len + names_len;
        if at - start > MAX_TABLE {
            return Ok((entries, true));
        }
        entries.push(Raw { fixed, extra, names });
    }
    Ok((entries, change))
}

/// Writes a new table if the old one breaks a rule or has a snapshot whose L1 table is `lost`.
/// Order: the new table, flush, the header.
pub(super) fn mend(
    image: &Image<'_>,
    lost: &BTreeSet<SnapshotL1>,
    append: &mut Append<'_>,
    report: &mut Report,
) -> Result<()> {
    if image.snapshots == 0 {
        return Ok(());
    }
    if !readable(image) && image.snapshots_offset != 0 {
        report.repaired(|| "the snapshot table cannot be found; it is left as it is".to_owned());
        return Ok(());
    }
    let (entries, change) =
        if image.snapshots_offset == 0 { (Vec::new(), true) } else { read(image)? };
    let (kept, gone): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|entry| !lost.contains(&entry.l1()));
    if !change && gone.is_empty() {
        return Ok(());
    }
    for entry in &gone {
        report.repaired(|| {
            format!(
                "removed snapshot '{}': its L1 table at {:#x} is lost",
                entry.tag(),
                entry.l1().offset
            )
        });
    }
    let bytes: Vec<u8> = kept.iter().flat_map(|entry| encode(image, entry)).collect();
    let place = if bytes.is_empty() { 0 } else { append.put(&bytes)? };
    image.storage.flush()?;
    let mut fields = [0; 12];
    fields[..4].copy_from_slice(&u32::try_from(kept.len()).unwrap_or(0).to_be_bytes());
    fields[4..].copy_from_slice(&place.to_be_bytes());
    // Count and offset in one write within one sector.
    image.storage.write_at(field::SNAPSHOTS, &[WriteBuf::new(&fields)])?;
    image.storage.flush()?;
    report.repaired(|| format!("the snapshot table is written anew with {} entries", kept.len()));
    Ok(())
}

/// An entry with the extra data that it must have: sizes that older programs left out.
fn encode(image: &Image<'_>, entry: &Raw) -> Vec<u8> {
    let mut extra = entry.extra.clone();
    if extra.len() < 8 {
        extra = u64::from(be32_at(&entry.fixed, 32)).to_be_bytes().to_vec();
    }
    if extra.len() < to_usize(NEEDED_EXTRA.into()) {
        extra.truncate(8);
        extra.extend(image.size.to_be_bytes());
    }
    let id = usize::from(be16_at(&entry.fixed, 12)).min(entry.names.len());
    let name = entry.names.len() - id;
    let mut out = entry.fixed.clone();
    out[12..14].copy_from_slice(&u16::try_from(id).unwrap_or(0).to_be_bytes());
    out[14..16].copy_from_slice(&u16::try_from(name).unwrap_or(0).to_be_bytes());
    out[36..40].copy_from_slice(&u32::try_from(extra.len()).unwrap_or(0).to_be_bytes());
    out.extend(extra);
    out.extend(&entry.names);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}
