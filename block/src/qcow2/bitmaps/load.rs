//! Reading the bitmaps when an image is opened.

use std::sync::Arc;

use crate::bitmap::{Bitmap, BitmapSet, Bits, Start, Stored};
use crate::num::{to_u64, to_usize};
use crate::qcow2::header::extension;
use crate::qcow2::layout::{HostOffset, Run};
use crate::qcow2::meta::Meta;
use crate::{Error, ReadBuf, Result};

use super::directory::{Check, Entry, Extension, flag};
use super::table::{Part, bits_of as bits_of_part};
use super::{AUTOCLEAR, Directory, directory, mark, table};

/// Most bytes of all tables together: an image may claim what it likes.
const MAX_TABLES: u64 = 64 << 20;
/// Most bytes of data clusters that are read.
const MAX_READ: u64 = 1 << 30;
/// Most bytes that all bitmaps take in memory.
const MAX_MEMORY: u64 = 1 << 30;
/// Data is read in pieces of this many bytes, or of one cluster.
const PIECE: u64 = 1 << 20;

/// Reads the bitmaps of an image that is being opened.
///
/// For writing, those that follow writes are marked as in_use before this returns, and the autoclear
/// bit stays; whatever else is wrong with the extension clears the bit, as for any feature that
/// writes here do not keep up to date.
///
/// # Errors
/// Damaged bitmaps refuse an opening for writing; read-only they are left out with a warning, so that
/// the disk can be rescued.
pub(in crate::qcow2) fn load(meta: &mut Meta) -> Result<BitmapSet> {
    let set = BitmapSet::default();
    match read(meta) {
        Ok(Some((directory, bitmaps))) => {
            meta.bitmaps = directory;
            for bitmap in bitmaps {
                set.add(bitmap)?;
            }
        }
        Ok(None) => return Ok(set),
        Err(Error::Corrupt { filename, reason }) if !meta.writable => {
            tracing::warn!(image = filename, "bitmaps are left out: {reason}");
            return Ok(set);
        }
        Err(e) => return Err(e),
    }
    if meta.writable {
        mark(meta, true, |entry| entry.flags & flag::AUTO != 0)?;
        for bitmap in set.persistent().iter().filter(|bitmap| bitmap.enabled()) {
            bitmap.set_stored(Stored::OutOfDate);
        }
    }
    Ok(set)
}

/// The directory and the bitmaps; `None` if the image has none, or none that count.
fn read(meta: &Meta) -> Result<Option<(Directory, Vec<Arc<Bitmap>>)>> {
    let Some(data) = meta.header.extension(extension::BITMAPS) else {
        return Ok(None);
    };
    if meta.header.autoclear & AUTOCLEAR == 0 {
        tracing::warn!(
            image = meta.storage.name(),
            "a program without support for bitmaps wrote to the image: its bitmaps do not count any more, and their clusters may be leaked (qemu-img check -r leaks)"
        );
        return Ok(None);
    }
    let (offset, entries, own) = read_directory(meta, data)?;
    let tables = read_tables(meta, &entries, own)?;
    let bitmaps = read_contents(meta, &entries, tables)?;
    Ok(Some((Directory { entries, offset }, bitmaps)))
}

fn corrupt(meta: &Meta, why: &str) -> Error {
    Error::Corrupt { filename: meta.storage.name().to_owned(), reason: format!("bitmaps: {why}") }
}

/// The directory's place in bytes, its entries, and the clusters that it takes.
fn read_directory(meta: &Meta, extension: &[u8]) -> Result<(u64, Vec<Entry>, Run)> {
    let corrupt = |why: String| corrupt(meta, &why);
    let geometry = meta.geometry();
    let file_len = meta.storage.len()?;
    let place = Extension::decode(extension, geometry, file_len).map_err(corrupt)?;
    let mut bytes = vec![0; to_usize(place.size)];
    meta.storage.read_at(place.offset, &[ReadBuf::new(&mut bytes)])?;
    let entries = directory::decode(&bytes, place.count, geometry, meta.header.size, file_len)
        .map_err(corrupt)?;
    let tables: u64 = entries.iter().map(Entry::table_bytes).sum();
    if tables > MAX_TABLES {
        return Err(corrupt(format!("their tables take {tables} bytes, more than {MAX_TABLES}")));
    }
    let first = geometry.cluster_of(HostOffset(place.offset));
    Ok((place.offset, entries, Run { first, count: geometry.clusters(place.size) }))
}

/// The table of each bitmap. No cluster may be in two of them, or among the directory's `own`.
fn read_tables(meta: &Meta, entries: &[Entry], own: Run) -> Result<Vec<Vec<Part>>> {
    let corrupt = |why: String| corrupt(meta, &why);
    let geometry = meta.geometry();
    let file_len = meta.storage.len()?;
    let mut runs = vec![own];
    let mut tables = Vec::with_capacity(entries.len());
    for entry in entries {
        // The contents of one that is in use count for nothing, and its table may be anything.
        if entry.in_use() {
            tables.push(Vec::new());
            runs.extend(table::runs(entry, &[], geometry));
            continue;
        }
        let wrong = |why: String| {
            corrupt(format!("bitmap '{}': {why}", String::from_utf8_lossy(&entry.name)))
        };
        let table = table::read(&*meta.storage, entry)?;
        let parts = table::decode(&table, geometry, file_len).map_err(wrong)?;
        runs.extend(table::runs(entry, &parts, geometry));
        tables.push(parts);
    }
    check_apart(runs).map_err(corrupt)?;
    let data = tables.iter().flatten().filter(|part| matches!(part, Part::Data(_))).count();
    if geometry.bytes_of(to_u64(data)) > MAX_READ {
        return Err(corrupt(format!("they have {data} data clusters, which is too much to read")));
    }
    Ok(tables)
}

/// The bitmaps whose use is known here.
fn read_contents(
    meta: &Meta,
    entries: &[Entry],
    tables: Vec<Vec<Part>>,
) -> Result<Vec<Arc<Bitmap>>> {
    let mut bitmaps = Vec::new();
    let mut memory = 0;
    for (entry, parts) in entries.iter().zip(tables) {
        let Some(name) = entry.usable_name() else {
            tracing::warn!(
                image = meta.storage.name(),
                "bitmap '{}' is left alone: what it is for is not known here",
                String::from_utf8_lossy(&entry.name)
            );
            continue;
        };
        let start = Start {
            enabled: entry.flags & flag::AUTO != 0,
            persistent: true,
            inconsistent: entry.in_use(),
            read_only: !meta.writable,
            stored: if entry.in_use() { Stored::OutOfDate } else { Stored::UpToDate },
        };
        // One that is inconsistent has no contents, and its granularity may not fit the disk.
        let size = if entry.in_use() { 0 } else { meta.header.size };
        let bitmap = Bitmap::new(name, entry.granularity, size, start)?;
        memory += bitmap.with_bits(|bits| read_bits(meta, &parts, bits, MAX_MEMORY - memory))?;
        bitmaps.push(Arc::new(bitmap));
    }
    Ok(bitmaps)
}

/// Refuses clusters that are there twice: loading would take as long, and as much memory, as such
/// tables claim, and freeing one bitmap would hurt the other.
fn check_apart(mut runs: Vec<Run>) -> Check<()> {
    runs.sort_unstable_by_key(|run| run.first);
    match runs.windows(2).find(|pair| pair[0].end() > pair[1].first) {
        Some(pair) => Err(format!("cluster {:#x} is used twice", pair[1].first)),
        None => Ok(()),
    }
}

/// Fills `bits` from data clusters; they may take `room` bytes of memory. Gives how many they take.
fn read_bits(meta: &Meta, parts: &[Part], bits: &mut Bits, room: u64) -> Result<u64> {
    let geometry = meta.geometry();
    let most = to_usize(geometry.clusters(PIECE).max(1));
    let mut index = 0;
    while index < parts.len() {
        let range = bits_of_part(to_u64(index), geometry);
        match parts[index] {
            Part::Zeroes => index += 1,
            Part::Ones => {
                bits.set(range);
                index += 1;
            }
            Part::Data(host) => {
                let next = |n: usize| Part::Data(host + geometry.bytes_of(to_u64(n)));
                let rest = parts[index..].iter().take(most).enumerate();
                let count = rest.take_while(|(n, part)| **part == next(*n)).count();
                let mut bytes = vec![0; to_usize(geometry.bytes_of(to_u64(count)))];
                meta.storage.read_at(host.0, &[ReadBuf::new(&mut bytes)])?;
                bits.copy_in(range.start, &bytes);
                index += count;
            }
        }
        if bits.memory() > room {
            return Err(
                meta.damaged(format!("bitmaps: they take more than {MAX_MEMORY} bytes of memory"))
            );
        }
    }
    Ok(bits.memory())
}
