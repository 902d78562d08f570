//! Making new images, with every option of `qemu-img create -f qcow2`.
//!
//! The file is laid out in one go:
//!
//! ```text
//! header | refcount table | refcount blocks | L1 table | L2 tables | data clusters
//!                                                        └ with preallocation ──┘
//! ```
//!
//! **Order of writes.** Everything but the header, flush, the header, flush: a file whose making was
//! cut off is no image, rather than a damaged one. A block device cannot be emptied: see `device`.

mod device;
mod layout;
mod options;

pub use options::{CreateOptions, Version};

use crate::num::{to_u64, to_usize};
use crate::preallocation::Preallocation;
use crate::storage::{FileStorage, Storage};
use crate::{Error, Progress, Result, WriteBuf};

use super::header::{Compression, extension, incompatible};
use super::layout::COPIED;
use layout::Layout;

/// Bytes of tables that are written at once.
const CHUNK: usize = 1 << 20;
/// Autoclear bit: the data file is a raw image of the disk.
const RAW_EXTERNAL: u64 = 2;
/// Compatible bit: refcounts may be written lazily.
const LAZY_REFCOUNTS: u64 = 1;
const HEADER_LENGTH: u32 = 112;
const V2_HEADER_LENGTH: usize = 72;
const DATA_FILE_EXTENSION: u32 = 0x4441_5441;

/// Makes an image in `storage`, which must be empty or a block device, whose contents are lost; the guest's data is in `data_file` if the
/// options ask for one, which the image names by its storage's name.
///
/// # Errors
/// Options that do not fit together, with QEMU's texts; what the host cannot do; cancellation. The
/// storage holds no image then, and should be removed.
pub fn create(
    storage: &dyn Storage,
    data_file: Option<&dyn Storage>,
    options: &CreateOptions,
    progress: &Progress,
) -> Result<()> {
    let plan = options.check(data_file.is_some())?;
    let layout = Layout::new(&plan)?;
    let header = header(&plan, &layout, data_file.map(Storage::name))?;
    let device = is_device(storage);
    if device {
        device::begin(storage, &layout)?;
    } else if !storage.is_empty()? {
        return Err(Error::Invalid(format!("'{}' is not empty", storage.name())));
    }
    let tables = layout.table_bytes();
    progress.add_total(tables);
    write_refcounts(storage, &layout, progress)?;
    write_l1(storage, &layout)?;
    write_l2(storage, &layout, data_file.is_some(), progress)?;
    match data_file {
        Some(data) => {
            if is_device(data) && layout.l2_tables > 0 {
                device::zero(data, 0, plan.size, progress)?;
            }
            plan.preallocation.take(data, 0, plan.size, progress)?;
            if data.len()? > plan.size {
                data.set_len(plan.size)?;
            }
            data.flush()?;
            storage.set_len(layout.end())?;
        }
        None => {
            let data = layout.data_offset();
            if device {
                device::zero(storage, data, layout.end() - data, progress)?;
            }
            plan.preallocation.take(storage, data, layout.end() - data, progress)?;
        }
    }
    storage.flush()?;
    storage.write_at(0, &[WriteBuf::new(&header)])?;
    storage.flush()
}

/// Whether what is there stays there until it is written over.
fn is_device(storage: &dyn Storage) -> bool {
    storage.file().is_some_and(FileStorage::is_device)
}

/// The refcount table, and blocks in which every cluster has one reference.
fn write_refcounts(storage: &dyn Storage, layout: &Layout, progress: &Progress) -> Result<()> {
    let size = to_usize(layout.cluster_size());
    let mut table = vec![0; to_usize(layout.table_clusters) * size];
    for (index, entry) in table.chunks_exact_mut(8).take(to_usize(layout.blocks)).enumerate() {
        let at = layout.offset(layout.first_block() + to_u64(index));
        entry.copy_from_slice(&at.to_be_bytes());
    }
    storage.write_at(layout.offset(layout.first_table()), &[WriteBuf::new(&table)])?;
    let mut full = vec![0; size];
    layout.count(&mut full, layout.block_entries());
    for index in 0..layout.blocks {
        progress.check()?;
        let at = layout.offset(layout.first_block() + index);
        let counted = layout.clusters() - index * layout.block_entries();
        if counted >= layout.block_entries() {
            storage.write_at(at, &[WriteBuf::new(&full)])?;
        } else {
            let mut last = vec![0; size];
            layout.count(&mut last, counted);
            storage.write_at(at, &[WriteBuf::new(&last)])?;
        }
    }
    Ok(())
}

fn write_l1(storage: &dyn Storage, layout: &Layout) -> Result<()> {
    let mut table = vec![0; to_usize(layout.l1_clusters * layout.cluster_size())];
    for (index, entry) in table.chunks_exact_mut(8).take(to_usize(layout.l2_tables)).enumerate() {
        let at = layout.offset(layout.first_l2() + to_u64(index)) | COPIED;
        entry.copy_from_slice(&at.to_be_bytes());
    }
    if table.is_empty() {
        return Ok(());
    }
    storage.write_at(layout.offset(layout.first_l1()), &[WriteBuf::new(&table)])
}

/// The L2 tables of a preallocated image, which lie in a row: an entry for each cluster. Entries of
/// a data file are guest offsets, as the file must stay a raw image.
fn write_l2(
    storage: &dyn Storage,
    layout: &Layout,
    external: bool,
    progress: &Progress,
) -> Result<()> {
    let mut at = layout.offset(layout.first_l2());
    let end = at + layout.l2_tables * layout.cluster_size();
    let base = if external { 0 } else { layout.data_offset() };
    let mut cluster = 0;
    let mut bytes = Vec::with_capacity(CHUNK);
    while at < end {
        progress.check()?;
        let n = to_usize((end - at).min(to_u64(CHUNK)));
        bytes.clear();
        while bytes.len() < n {
            let entry = if cluster < layout.data_clusters {
                (base + cluster * layout.cluster_size()) | COPIED
            } else {
                0
            };
            bytes.extend(entry.to_be_bytes());
            // No subcluster of an extended entry has data yet.
            bytes.resize(bytes.len().next_multiple_of(layout.l2_entry_len), 0);
            cluster += 1;
        }
        storage.write_at(at, &[WriteBuf::new(&bytes)])?;
        progress.advance(to_u64(n));
        at += to_u64(n);
    }
    Ok(())
}

/// The header with its extensions, and the backing file's name behind them.
fn header(plan: &options::Plan, layout: &Layout, data_file: Option<&str>) -> Result<Vec<u8>> {
    let v3 = plan.version == Version::V3;
    let backing = plan.backing_file.as_deref().unwrap_or_default();
    let mut out = b"QFI\xfb".to_vec();
    out.extend((if v3 { 3u32 } else { 2 }).to_be_bytes());
    out.extend([0; 12]);
    out.extend(plan.cluster_bits.to_be_bytes());
    out.extend(plan.size.to_be_bytes());
    out.extend([0; 4]);
    out.extend(layout.l1_entries.to_be_bytes());
    let l1 = if layout.l1_clusters > 0 { layout.offset(layout.first_l1()) } else { 0 };
    out.extend(l1.to_be_bytes());
    out.extend(layout.offset(layout.first_table()).to_be_bytes());
    out.extend(u32::try_from(layout.table_clusters).unwrap_or(u32::MAX).to_be_bytes());
    out.extend([0; 12]);
    debug_assert_eq!(out.len(), V2_HEADER_LENGTH);
    if v3 {
        add_version_3_fields(&mut out, plan, data_file.is_some());
    }
    add_extensions(&mut out, plan, data_file);
    if !backing.is_empty() {
        let at = out.len();
        out[8..16].copy_from_slice(&to_u64(at).to_be_bytes());
        let len = u32::try_from(backing.len()).unwrap_or(u32::MAX);
        out[16..20].copy_from_slice(&len.to_be_bytes());
        out.extend(backing.as_bytes());
    }
    if to_u64(out.len()) > layout.cluster_size() {
        return Err(Error::Invalid(format!(
            "The names of backing file and data file do not fit the header, which is a cluster of \
             {} bytes; use a larger cluster size",
            layout.cluster_size()
        )));
    }
    out.resize(to_usize(layout.cluster_size()), 0);
    Ok(out)
}

/// What version 3 has behind the fields of version 2.
fn add_version_3_fields(out: &mut Vec<u8>, plan: &options::Plan, external: bool) {
    let mut bits = 0;
    for (set, bit) in [
        (external, incompatible::DATA_FILE),
        (plan.compression != Compression::Zlib, incompatible::COMPRESSION),
        (plan.extended_l2, incompatible::EXTENDED_L2),
    ] {
        bits |= if set { bit } else { 0 };
    }
    out.extend(bits.to_be_bytes());
    out.extend((if plan.lazy_refcounts { LAZY_REFCOUNTS } else { 0 }).to_be_bytes());
    out.extend((if plan.data_file_raw { RAW_EXTERNAL } else { 0 }).to_be_bytes());
    out.extend(plan.refcount_order.to_be_bytes());
    out.extend(HEADER_LENGTH.to_be_bytes());
    out.push(match plan.compression {
        Compression::Zlib => 0,
        Compression::Zstd => 1,
    });
    out.extend([0; 7]);
}

/// The extensions, with their end mark.
fn add_extensions(out: &mut Vec<u8>, plan: &options::Plan, data_file: Option<&str>) {
    let mut extend = |kind: u32, data: &[u8]| {
        out.extend(kind.to_be_bytes());
        out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(data);
        out.resize(out.len().next_multiple_of(8), 0);
    };
    if let Some(format) = &plan.backing_fmt {
        extend(extension::BACKING_FORMAT, format.as_bytes());
    }
    if let Some(name) = data_file {
        extend(DATA_FILE_EXTENSION, name.as_bytes());
    }
    // Its table would fill the whole header of an image with the smallest clusters.
    if plan.version == Version::V3 && plan.cluster_bits > 9 {
        extend(extension::FEATURE_NAMES, &feature_names());
    }
    extend(0, &[]);
}

/// The names of all feature bits, for programs that do not know them: kind, bit, name.
fn feature_names() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::new();
    for (kind, bit, name) in NAMES {
        let end = out.len() + 48;
        out.extend([kind, bit]);
        out.extend(name.as_bytes());
        out.resize(end, 0);
    }
    out
}

/// Whether the mode needs the mapping to be there.
fn maps(mode: Preallocation) -> bool {
    mode != Preallocation::Off
}
