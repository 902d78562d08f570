//! The snapshot table ("Snapshots" of the specification), read and replaced as a whole.

use crate::num::{be16_at, be32_at, be64_at, to_u64, to_usize};
use crate::qcow2::header::{Header, field};
use crate::qcow2::layout::{HostOffset, Run};
use crate::qcow2::meta::Meta;
use crate::snapshot::SnapshotInfo;
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result};

/// Most bytes of a table (QEMU's QCOW_MAX_SNAPSHOTS_SIZE).
const MAX_TABLE: u64 = 64 << 20;
/// Most bytes of extra data of an entry (QEMU's QCOW_MAX_SNAPSHOT_EXTRA_DATA).
const MAX_EXTRA: u32 = 1024;
const FIXED: usize = 40;
/// Extra data that is known: VM-state size, disk size, instruction counter.
const EXTRA: usize = 24;
const NO_ICOUNT: u64 = u64::MAX;

/// An entry of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::qcow2) struct Entry {
    pub(crate) info: SnapshotInfo,
    /// Id and tag as they are in the image: they need not be UTF-8 there, and go back unchanged.
    pub(crate) id: Vec<u8>,
    pub(crate) tag: Vec<u8>,
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
    /// Extra data that is not known here, kept as it is.
    pub(crate) unknown_extra: Vec<u8>,
}

/// Reads the table; gives the entries and the clusters they lie in.
pub(in crate::qcow2) fn read_table(
    storage: &dyn Storage,
    header: &Header,
) -> Result<(Vec<Entry>, Option<Run>)> {
    if header.snapshots == 0 {
        return Ok((Vec::new(), None));
    }
    let file_len = storage.len()?;
    let start = header.snapshots_offset;
    let mut at = start;
    let mut entries = Vec::new();
    for index in 0..header.snapshots {
        let corrupt = |reason: &str| Error::Corrupt {
            filename: storage.name().to_owned(),
            reason: format!("snapshot table entry {index} at {at:#x} {reason}"),
        };
        let mut fixed = [0; FIXED];
        storage.read_at(at, &[ReadBuf::new(&mut fixed)])?;
        let (extra_len, id_len, name_len) =
            (be32_at(&fixed, 36), be16_at(&fixed, 12), be16_at(&fixed, 14));
        if extra_len > MAX_EXTRA {
            return Err(corrupt(&format!("has {extra_len} bytes of extra data")));
        }
        let rest = u64::from(extra_len) + u64::from(id_len) + u64::from(name_len);
        let end = at + to_u64(FIXED) + rest;
        if end > file_len {
            return Err(corrupt("is beyond the end of the file"));
        }
        if end - start > MAX_TABLE {
            return Err(corrupt("makes the table too large"));
        }
        let mut bytes = vec![0; to_usize(rest)];
        storage.read_at(at + to_u64(FIXED), &[ReadBuf::new(&mut bytes)])?;
        let (extra, names) = bytes.split_at(to_usize(extra_len.into()));
        entries.push(decode(&fixed, extra, names, header.size));
        at = end.next_multiple_of(8);
    }
    let geometry = header.geometry;
    let run =
        Run { first: geometry.cluster_of(HostOffset(start)), count: geometry.clusters(at - start) };
    Ok((entries, Some(run)))
}

fn decode(fixed: &[u8], extra: &[u8], names: &[u8], disk_size: u64) -> Entry {
    let (id, name) = names.split_at(usize::from(be16_at(fixed, 12)).min(names.len()));
    let known = |at: usize| (extra.len() >= at + 8).then(|| be64_at(extra, at));
    Entry {
        info: SnapshotInfo {
            id: String::from_utf8_lossy(id).into_owned(),
            tag: String::from_utf8_lossy(name).into_owned(),
            vm_state_size: known(0).unwrap_or(be32_at(fixed, 32).into()),
            disk_size: known(8).unwrap_or(disk_size),
            date_sec: be32_at(fixed, 16),
            date_nsec: be32_at(fixed, 20),
            vm_clock_nsec: be64_at(fixed, 24),
            icount: known(16).filter(|n| *n != NO_ICOUNT),
        },
        id: id.to_vec(),
        tag: name.to_vec(),
        l1_offset: be64_at(fixed, 0),
        l1_size: be32_at(fixed, 8),
        unknown_extra: extra.get(EXTRA..).unwrap_or_default().to_vec(),
    }
}

fn short(len: usize) -> Result<[u8; 2]> {
    u16::try_from(len)
        .map(u16::to_be_bytes)
        .map_err(|_| Error::Invalid("snapshot id or tag is longer than 65535 bytes".to_owned()))
}

fn encode(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for entry in entries {
        let info = &entry.info;
        let extra_len = u32::try_from(EXTRA + entry.unknown_extra.len()).unwrap_or(MAX_EXTRA);
        out.extend(entry.l1_offset.to_be_bytes());
        out.extend(entry.l1_size.to_be_bytes());
        out.extend(short(entry.id.len())?);
        out.extend(short(entry.tag.len())?);
        out.extend(info.date_sec.to_be_bytes());
        out.extend(info.date_nsec.to_be_bytes());
        out.extend(info.vm_clock_nsec.to_be_bytes());
        // What does not fit the old field is only in the extra data.
        let short_size = u32::try_from(info.vm_state_size).unwrap_or(0);
        out.extend(short_size.to_be_bytes());
        out.extend(extra_len.to_be_bytes());
        out.extend(info.vm_state_size.to_be_bytes());
        out.extend(info.disk_size.to_be_bytes());
        out.extend(info.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        out.extend(&entry.unknown_extra);
        out.extend(&entry.id);
        out.extend(&entry.tag);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    Ok(out)
}

/// Writes count and place of the table to the header.
fn write_table_place(meta: &Meta, count: u64, run: Option<Run>) -> Result<()> {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let offset = run.map_or(0, |run| meta.geometry().offset_of(run.first).0);
    let mut fields = [0; 12];
    fields[..4].copy_from_slice(&count.to_be_bytes());
    fields[4..].copy_from_slice(&offset.to_be_bytes());
    // Count and offset in one write within one sector: old or new, never a mix.
    meta.write_field(field::SNAPSHOTS, &fields)
}

/// Replaces the table by another: written to fresh clusters, made valid by one header write.
#[derive(Debug)]
pub(super) struct TableSwitch {
    new: Vec<Entry>,
    new_run: Option<Run>,
    old: Option<(Vec<Entry>, Option<Run>)>,
}

impl TableSwitch {
    /// Writes the new table. It is durable, and its clusters are counted, only after a
    /// [`Meta::sync`].
    pub(crate) fn write(meta: &mut Meta, new: Vec<Entry>) -> Result<Self> {
        let bytes = encode(&new)?;
        if to_u64(bytes.len()) > MAX_TABLE {
            return Err(Error::NotSupported(format!(
                "Image '{}': its snapshot table is at its largest",
                meta.storage.name()
            )));
        }
        let new_run = if new.is_empty() { None } else { Some(super::write_fresh(meta, bytes)?) };
        Ok(Self { new, new_run, old: None })
    }

    fn write_header(meta: &Meta, entries: &[Entry], run: Option<Run>) -> Result<()> {
        write_table_place(meta, to_u64(entries.len()), run)?;
        meta.storage.flush()
    }

    /// Makes the new table valid, on disk first. After an error the disk may have either;
    /// [`TableSwitch::undo`] settles it.
    pub(crate) fn publish(&mut self, meta: &mut Meta) -> Result<()> {
        let old_entries = std::mem::replace(&mut meta.snapshots, self.new.clone());
        let old_run = std::mem::replace(&mut meta.snapshot_table, self.new_run);
        self.old = Some((old_entries, old_run));
        meta.note_snapshots();
        Self::write_header(meta, &self.new, self.new_run)
    }

    /// Makes the old table valid again, if the new one was, and frees the new one. If that fails the
    /// disk may have either until the next [`Meta::sync`], and both keep their clusters.
    pub(crate) fn undo(&mut self, meta: &mut Meta) -> Result<()> {
        if let Some((entries, run)) = self.old.take() {
            let written = Self::write_header(meta, &entries, run);
            meta.snapshots = entries;
            meta.snapshot_table = run;
            meta.note_snapshots();
            meta.unsettled |= written.is_err();
            written?;
        }
        match self.new_run.take() {
            Some(run) => meta.free(run),
            None => Ok(()),
        }
    }

    /// Frees the old table.
    pub(crate) fn finish(&mut self, meta: &mut Meta) -> Result<()> {
        match self.old.take() {
            Some((_, Some(run))) => meta.free(run),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_decoded_as_it_was_encoded_with_unknown_extra_data() {
        let entry = Entry {
            info: SnapshotInfo {
                id: "7".into(),
                tag: "before \u{e9}".into(),
                vm_state_size: 5 << 30,
                disk_size: 1 << 40,
                date_sec: 1,
                date_nsec: 2,
                vm_clock_nsec: 3,
                icount: None,
            },
            id: b"7".to_vec(),
            tag: "before \u{e9}".into(),
            l1_offset: 0x30000,
            l1_size: 9,
            unknown_extra: vec![1, 2, 3],
        };
        let bytes = encode(std::slice::from_ref(&entry)).unwrap();
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(be32_at(&bytes, 32), 0, "the old field cannot hold 5 GiB");
        let extra = EXTRA + 3;
        let names = &bytes[FIXED + extra..][..1 + "before \u{e9}".len()];
        let back = decode(&bytes[..FIXED], &bytes[FIXED..][..extra], names, 0);
        assert_eq!(back, entry);
    }

    #[test]
    fn a_tag_that_is_not_utf8_goes_back_as_it_was() {
        let mut fixed = [0; FIXED];
        fixed[13] = 1;
        fixed[15] = 3;
        let entry = decode(&fixed, &[], b"1a\xe9b", 512);
        assert_eq!(entry.info.tag, "a\u{fffd}b");
        let bytes = encode(&[entry]).unwrap();
        assert_eq!(&bytes[FIXED + EXTRA..][..4], b"1a\xe9b");
    }
}
