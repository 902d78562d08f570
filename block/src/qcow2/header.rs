//! The image header: parsed, and checked against every limit before anything is allocated.

use std::fmt::{self, Display, Formatter};

use crate::num::{be32_at, be64_at, to_u64, to_usize};
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result};

use super::layout::{Geometry, OFFSET_MASK};

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bytes of the shortest header of version 3.
const V3_HEADER: u64 = 104;
/// Most bytes of an L1 table (QEMU's QCOW_MAX_L1_SIZE).
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Most bytes of the refcount table (QEMU's QCOW_MAX_REFTABLE_SIZE).
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most snapshots (QEMU's QCOW_MAX_SNAPSHOTS).
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Extended L2 entries need clusters of 16 KiB, so that a subcluster is no less than a sector.
const MIN_EXTENDED_BITS: u32 = 14;
/// Most bytes of a backing file's name.
pub(super) const MAX_BACKING_NAME: u32 = 1023;

/// Byte offsets of the header fields that change.
pub(super) mod field {
    /// Disk size; L1 size and offset follow (with the unused crypt method), up to byte 48.
    pub(in crate::qcow2) const SIZE: u64 = 24;
    /// Refcount table offset, then its clusters.
    pub(in crate::qcow2) const REFCOUNT_TABLE: u64 = 48;
    /// Number of snapshots, then the table's offset.
    pub(in crate::qcow2) const SNAPSHOTS: u64 = 60;
    /// Incompatible features.
    pub(in crate::qcow2) const INCOMPATIBLE: u64 = 72;
    /// Autoclear features.
    pub(in crate::qcow2) const AUTOCLEAR: u64 = 88;
}

/// Incompatible feature bits.
pub(super) mod incompatible {
    pub(in crate::qcow2) const DIRTY: u64 = 1;
    pub(in crate::qcow2) const CORRUPT: u64 = 2;
    pub(in crate::qcow2) const DATA_FILE: u64 = 4;
    pub(in crate::qcow2) const COMPRESSION: u64 = 8;
    pub(in crate::qcow2) const EXTENDED_L2: u64 = 16;
}

/// Compatible feature bits.
pub(super) mod compatible {
    pub(in crate::qcow2) const LAZY: u64 = 1;
}

/// Autoclear feature bits.
pub(super) mod autoclear {
    /// The external data file is what the guest sees, readable as a raw image.
    pub(in crate::qcow2) const RAW_DATA: u64 = 2;
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Display for Compression {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// The header's fields.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(crate) geometry: Geometry,
    pub(crate) size: u64,
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Compression,
    pub(crate) backing_file: Option<String>,
    /// The backing file's name as it is in the image, which need not be UTF-8.
    pub(crate) backing_bytes: Vec<u8>,
    pub(crate) backing_format: Option<String>,
    /// All extensions in their order, those that are not known here too.
    pub(crate) extensions: Vec<Extension>,
    /// Bytes before the extensions.
    pub(crate) length: u32,
    /// Where the backing file's name is; 0 without one.
    pub(crate) backing_offset: u64,
    /// A write of the header failed: the disk may have what was to be written, or what is here.
    pub(crate) doubtful: bool,
}

/// A header extension as it is in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extension {
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// Kinds of header extensions.
pub(super) mod extension {
    pub(in crate::qcow2) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(in crate::qcow2) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(in crate::qcow2) const BITMAPS: u32 = 0x2385_2875;
    pub(in crate::qcow2) const DATA_FILE: u32 = 0x4441_5441;
}

/// The result of a check; the error says which rule is broken.
type Check<T> = std::result::Result<T, String>;

fn get_u32(bytes: &[u8], at: usize) -> u32 {
    be32_at(bytes, at)
}

fn corrupt(filename: &str, reason: String) -> Error {
    Error::Corrupt { filename: filename.to_owned(), reason }
}

fn unsupported(filename: &str, what: &str) -> Error {
    Error::NotSupported(format!("Image '{filename}' {what}"))
}

/// A field of feature bits, which version 2 does not have.
pub(super) fn features(fixed: &[u8; 112], version: u32, at: usize) -> u64 {
    if version == 3 { be64_at(fixed, at) } else { 0 }
}

/// Checks the fields that all others depend on. Returns the geometry and the length of the header.
pub(super) fn geometry(fixed: &[u8; 112], name: &str, file_len: u64) -> Result<(Geometry, u32)> {
    let corrupt = |reason| corrupt(name, reason);
    let unsupported = |what: String| unsupported(name, &what);
    let version = get_u32(fixed, 4);
    if !(2..=3).contains(&version) {
        return Err(unsupported(format!(
            "is qcow2 version {version}, only versions 2 and 3 are supported"
        )));
    }
    let v3 = version == 3;
    if v3 && file_len < V3_HEADER {
        let reason = format!("is truncated: {file_len} bytes, the header has at least 104");
        return Err(Error::NotFormat { format: "qcow2", filename: name.to_owned(), reason });
    }
    let cluster_bits = get_u32(fixed, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(corrupt(format!("cluster_bits is {cluster_bits}, must be 9 to 21")));
    }
    let header_length = if v3 { get_u32(fixed, 100) } else { 72 };
    if u64::from(header_length) > 1 << cluster_bits || (v3 && header_length < 104) {
        return Err(corrupt(format!(
            "header_length is {header_length}, must be 104 up to the cluster size"
        )));
    }
    let refcount_order = if v3 { get_u32(fixed, 96) } else { 4 };
    if refcount_order > 6 {
        return Err(corrupt(format!("refcount_order is {refcount_order}, must be 0 to 6")));
    }
    match get_u32(fixed, 32) {
        0 => {}
        1 => return Err(unsupported("is encrypted (AES), which is not supported".into())),
        2 => return Err(unsupported("is encrypted (LUKS), which is not supported".into())),
        n => return Err(corrupt(format!("unknown encryption method {n}"))),
    }
    let incompatible = features(fixed, version, 72);
    let extended = incompatible & incompatible::EXTENDED_L2 != 0;
    if extended && cluster_bits < MIN_EXTENDED_BITS {
        return Err(corrupt(format!(
            "it has extended L2 entries and clusters of {} bytes, fewer than 16384",
            1u64 << cluster_bits
        )));
    }
    let external = incompatible & incompatible::DATA_FILE != 0;
    Ok((Geometry { cluster_bits, refcount_order, version, extended, external }, header_length))
}

/// How clusters are compressed: the type must be one that is known, and the incompatible bit set for all
/// but zlib.
pub(super) fn compression(incompatible: u64, header_length: u32, kind: u8) -> Check<Compression> {
    let marked = incompatible & incompatible::COMPRESSION != 0;
    match if header_length > 104 { kind } else { 0 } {
        0 if !marked => Ok(Compression::Zlib),
        1 if marked => Ok(Compression::Zstd),
        n @ 0..=1 => Err(format!(
            "has compression type {n}, whose incompatible feature bit must {}be set",
            if n == 0 { "not " } else { "" }
        )),
        n => Err(format!("has unknown compression type {n}")),
    }
}

/// Whether the backing file's name lies in the first cluster. An offset of 0 says that there is none.
pub(super) fn check_backing_place(offset: u64, len: u32, cluster: u64) -> Check<()> {
    let end = offset.checked_add(len.into());
    if offset != 0 && (len > MAX_BACKING_NAME || end.is_none_or(|end| end > cluster)) {
        return Err(format!(
            "backing file name at {offset:#x} ({len} bytes) does not fit the first cluster or is longer than {MAX_BACKING_NAME} bytes"
        ));
    }
    Ok(())
}

impl Header {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::NotFormat`] if there is no qcow2 magic, [`Error::Corrupt`] if a field breaks its
    /// rule, [`Error::NotSupported`] for features that are not done here.
    pub(crate) fn read(storage: &dyn Storage) -> Result<Self> {
        let file_len = storage.len()?;
        let mut fixed = [0; 112];
        storage.read_at(0, &[ReadBuf::new(&mut fixed)])?;
        check_magic(storage.name(), &fixed, file_len)?;
        let corrupt = |reason| corrupt(storage.name(), reason);
        let unsupported = |what: String| unsupported(storage.name(), &what);
        let (geometry, header_length) = geometry(&fixed, storage.name(), file_len)?;
        let mut header = Self::of_fields(&fixed, geometry, header_length);
        header.check_tables(file_len).map_err(corrupt)?;
        let mut first = vec![0; to_usize(header.geometry.cluster_size())];
        storage.read_at(0, &[ReadBuf::new(&mut first)])?;
        // The backing file's name may follow without an end mark (images of old programs).
        let end = match be64_at(&fixed, 8) {
            0 => first.len(),
            offset => to_usize(offset).min(first.len()),
        };
        let names = header
            .read_extensions(&first[..end], to_usize(header_length.into()))
            .map_err(corrupt)?;
        header.check_features(&names).map_err(unsupported)?;
        header.compression =
            compression(header.incompatible, header_length, fixed[104]).map_err(unsupported)?;
        header
            .read_backing_name(&first, be64_at(&fixed, 8), get_u32(&fixed, 16))
            .map_err(corrupt)?;
        Ok(header)
    }

    /// The fields as they are in the image, without what follows them.
    fn of_fields(fixed: &[u8; 112], geometry: Geometry, header_length: u32) -> Self {
        let features = |at| features(fixed, geometry.version, at);
        Self {
            geometry,
            size: be64_at(fixed, 24),
            l1_size: get_u32(fixed, 36),
            l1_offset: be64_at(fixed, 40),
            refcount_table_offset: be64_at(fixed, 48),
            refcount_table_clusters: get_u32(fixed, 56),
            snapshots: get_u32(fixed, 60),
            snapshots_offset: be64_at(fixed, 64),
            incompatible: features(72),
            compatible: features(80),
            autoclear: features(88),
            compression: Compression::Zlib,
            backing_file: None,
            backing_bytes: Vec::new(),
            backing_format: None,
            extensions: Vec::new(),
            length: header_length,
            backing_offset: be64_at(fixed, 8),
            doubtful: false,
        }
    }

    /// Checks sizes and places of the tables.
    fn check_tables(&self, file_len: u64) -> Check<()> {
        let geometry = self.geometry;
        let place = |what: &str, offset: u64, bytes: u64| {
            if geometry.in_cluster(offset) != 0 {
                return Err(format!("{what} offset {offset:#x} is not cluster aligned"));
            }
            if offset & !OFFSET_MASK != 0 || (offset == 0 && bytes != 0) {
                return Err(format!("{what} offset {offset:#x} is not a valid host offset"));
            }
            match offset.checked_add(bytes) {
                Some(end) if end <= file_len || bytes == 0 => Ok(()),
                _ => Err(format!(
                    "{what} at {offset:#x} ({bytes} bytes) is beyond the end of the file ({file_len} bytes); is the file truncated?"
                )),
            }
        };
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(format!("l1_size is {}, the table is too large", self.l1_size));
        }
        if geometry.l1_entries(self.size) > u64::from(self.l1_size) {
            return Err(format!(
                "l1_size is {}, too small for a disk of {} bytes",
                self.l1_size, self.size
            ));
        }
        place("L1 table", self.l1_offset, l1_bytes)?;
        let table_bytes = u64::from(self.refcount_table_clusters) << geometry.cluster_bits;
        if table_bytes > MAX_REFTABLE_BYTES.max(geometry.cluster_size()) {
            return Err(format!(
                "refcount table of {} clusters is too large",
                self.refcount_table_clusters
            ));
        }
        if self.refcount_table_clusters == 0 {
            return Err("there is no refcount table".to_owned());
        }
        // The last table cluster may be cut short by the end of the file, its start may not.
        place("refcount table", self.refcount_table_offset, 1)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(format!("{} snapshots are too many", self.snapshots));
        }
        place("snapshot table", self.snapshots_offset, u64::from(self.snapshots) * 40)
    }

    /// Reads the header extensions; gives the feature names as (type, bit, name).
    fn read_extensions(&mut self, first: &[u8], mut at: usize) -> Check<Vec<(u8, u8, String)>> {
        let mut names = Vec::new();
        while at + 8 <= first.len() {
            let kind = get_u32(first, at);
            let len = to_usize(get_u32(first, at + 4).into());
            let Some(data) = first.get(at + 8..).and_then(|rest| rest.get(..len)) else {
                if kind == 0 {
                    break;
                }
                return Err(format!(
                    "header extension {kind:#x} of {len} bytes does not fit the first cluster"
                ));
            };
            match kind {
                0 => break,
                extension::BACKING_FORMAT => {
                    self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                extension::FEATURE_NAMES => {
                    for entry in data.chunks_exact(48) {
                        let text = entry[2..].split(|b| *b == 0).next().unwrap_or_default();
                        names.push((entry[0], entry[1], String::from_utf8_lossy(text).into()));
                    }
                }
                // What is unknown is kept and ignored, as the specification says.
                _ => {}
            }
            self.extensions.push(Extension { kind, data: data.to_vec() });
            at += 8 + len.next_multiple_of(8);
        }
        Ok(names)
    }

    /// Refuses incompatible features that are not done here, by name.
    fn check_features(&self, names: &[(u8, u8, String)]) -> Check<()> {
        use incompatible::{COMPRESSION, CORRUPT, DATA_FILE, DIRTY, EXTENDED_L2};
        let known = DIRTY | CORRUPT | COMPRESSION | DATA_FILE | EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown == 0 {
            return Ok(());
        }
        let name_of = |bit: u8| {
            let listed = names.iter().find(|(kind, b, _)| *kind == 0 && *b == bit);
            match listed {
                Some((_, _, name)) => name.clone(),
                None => format!("unknown incompatible feature {bit}"),
            }
        };
        let list: Vec<_> = (0..64).filter(|bit| unknown >> bit & 1 != 0).map(name_of).collect();
        Err(format!("uses features that are not supported: {}", list.join(", ")))
    }

    fn read_backing_name(&mut self, first: &[u8], offset: u64, len: u32) -> Check<()> {
        if offset == 0 {
            return Ok(());
        }
        check_backing_place(offset, len, to_u64(first.len()))?;
        let name = &first[to_usize(offset)..][..to_usize(len.into())];
        self.backing_file = Some(String::from_utf8_lossy(name).into_owned());
        self.backing_bytes = name.to_vec();
        Ok(())
    }
}

pub(super) fn check_magic(filename: &str, bytes: &[u8], file_len: u64) -> Result<()> {
    let reason = if file_len == 0 {
        "is empty".to_owned()
    } else if file_len < 72 {
        format!("is truncated: {file_len} bytes, the header has at least 72")
    } else if !bytes.starts_with(MAGIC) {
        format!("starts with {:02x?} instead of \"QFI\\xfb\"", &bytes[..4])
    } else {
        return Ok(());
    };
    Err(Error::NotFormat { format: "qcow2", filename: filename.to_owned(), reason })
}
