//! Rewriting the header's first cluster: what is not understood stays byte for byte.

use crate::num::{be32_at, be64_at, to_u64, to_usize};
use crate::storage::Storage;
use crate::{Error, ReadBuf, Result, WriteBuf};

use super::header::{Extension, Header, MAX_BACKING_NAME, extension, field};

/// What a disk writes wholly or not at all.
const SECTOR: usize = 512;

impl Header {
    /// The data of the first extension of a kind.
    pub(crate) fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|e| e.kind == kind).map(|e| e.data.as_slice())
    }

    /// Sets or removes an extension; others keep their places. A new one comes first: what says how
    /// the image is to be read shall be in the first sector.
    pub(crate) fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        let at = self.extensions.iter().position(|e| e.kind == kind);
        match (at, data) {
            (Some(at), Some(data)) => self.extensions[at].data = data,
            (Some(at), None) => drop(self.extensions.remove(at)),
            (None, Some(data)) => self.extensions.insert(0, Extension { kind, data }),
            (None, None) => {}
        }
    }

    /// Changes the backing file that the image names.
    pub(crate) fn set_backing(&mut self, name: Option<&str>, format: Option<&str>) {
        self.backing_file = name.map(str::to_owned);
        self.backing_bytes = name.unwrap_or_default().as_bytes().to_vec();
        let format = format.filter(|_| name.is_some());
        self.backing_format = format.map(str::to_owned);
        self.set_extension(extension::BACKING_FORMAT, format.map(|f| f.as_bytes().to_vec()));
    }

    /// Host offset and bytes of the directory of persistent bitmaps. Without the autoclear bit the
    /// extension counts for nothing: its clusters may have been given to others.
    pub(crate) fn bitmap_directory(&self) -> Option<(u64, u64)> {
        /// QEMU's QCOW2_MAX_BITMAP_DIRECTORY_SIZE.
        const MOST: u64 = 64 << 20;
        let valid = self.autoclear & super::bitmaps::AUTOCLEAR != 0;
        let data = self.extension(extension::BITMAPS).filter(|_| valid)?;
        let (bytes, offset) = (be64_at(data, 8), be64_at(data, 16));
        (offset != 0 && bytes <= MOST).then_some((offset, bytes))
    }

    /// The external data file's name.
    pub(crate) fn data_file(&self) -> Option<String> {
        let data = self.extension(extension::DATA_FILE)?;
        Some(String::from_utf8_lossy(data).into_owned())
    }

    /// The extensions as they are in the image, with the end mark.
    fn encode_extensions(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for Extension { kind, data } in &self.extensions {
            out.extend(kind.to_be_bytes());
            out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
        out
    }

    /// Writes extensions, the name of the backing file and the feature bits.
    ///
    /// **Order.** The new name goes where neither the old header nor the old name is, where there is
    /// room, and is durable first. Then comes what lies past the first sector, then the first sector:
    /// it refers to the name, has the bits and begins the extensions. With extensions that fit the
    /// first sector, as all but long tables of feature names do, a crash leaves the old header or
    /// the new one. The file grows by nothing and no table moves. After a failed write nothing is
    /// left out because it looks the same: a flush that failed may have lost what a read gives.
    pub(crate) fn write(&mut self, storage: &dyn Storage) -> Result<()> {
        let size = to_usize(self.geometry.cluster_size());
        let mut old = vec![0; size];
        storage.read_at(0, &[ReadBuf::new(&mut old)])?;
        let fixed = to_usize(self.length.into());
        let extensions = self.encode_extensions();
        let end = fixed + extensions.len();
        let name = self.backing_bytes.clone();
        let (at, fresh) =
            self.place_of_name(&old, end, &name).ok_or_else(|| self.too_long(storage))?;
        let mut new = old.clone();
        new[fixed..end].copy_from_slice(&extensions);
        let (offset, len) = if name.is_empty() { (0, 0) } else { (at, name.len()) };
        new[8..16].copy_from_slice(&to_u64(offset).to_be_bytes());
        new[16..20].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_be_bytes());
        if self.geometry.version >= 3 {
            let bits = to_usize(field::INCOMPATIBLE);
            new[bits..bits + 8].copy_from_slice(&self.incompatible.to_be_bytes());
            new[bits + 8..bits + 16].copy_from_slice(&self.compatible.to_be_bytes());
            new[bits + 16..bits + 24].copy_from_slice(&self.autoclear.to_be_bytes());
        }
        if fresh && !name.is_empty() {
            storage.write_at(to_u64(at), &[WriteBuf::new(&name)])?;
            storage.flush()?;
        }
        new[at..at + name.len()].copy_from_slice(&name);
        // What an old name left behind is no part of the header any more.
        let rest_end = (at + name.len()).max(end);
        for sector in (1..rest_end.div_ceil(SECTOR)).rev() {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(size);
            if self.doubtful || new[range.clone()] != old[range.clone()] {
                storage.write_at(to_u64(range.start), &[WriteBuf::new(&new[range])])?;
            }
        }
        if self.doubtful || new[..SECTOR.min(size)] != old[..SECTOR.min(size)] {
            storage.write_at(0, &[WriteBuf::new(&new[..SECTOR.min(size)])])?;
        }
        storage.flush()?;
        self.backing_offset = to_u64(offset);
        self.doubtful = false;
        Ok(())
    }

    /// The end of the extensions on disk.
    fn old_end(&self, old: &[u8]) -> usize {
        let mut at = to_usize(self.length.into());
        while at + 8 <= old.len() {
            let (kind, len) = (be32_at(old, at), be32_at(old, at + 4));
            at += 8;
            if kind == 0 {
                break;
            }
            at += to_usize(u64::from(len).next_multiple_of(8));
        }
        at.min(old.len())
    }

    /// Where the name goes, and whether nothing of the header on disk is there: behind the
    /// extensions, behind the old name, or in the old one's place if there is no more room.
    fn place_of_name(&self, old: &[u8], end: usize, name: &[u8]) -> Option<(usize, bool)> {
        if name.len() > to_usize(MAX_BACKING_NAME.into()) || end > old.len() {
            return None;
        }
        let before = to_usize(be64_at(old, 8).min(to_u64(old.len())));
        let before_end = (before + to_usize(be32_at(old, 16).into())).min(old.len());
        // The same name in the same place is left alone.
        if !name.is_empty() && before >= end && &old[before..before_end] == name {
            return Some((before, true));
        }
        let first = end.max(self.old_end(old));
        let apart = |at: usize| at >= before_end || at + name.len() <= before;
        let free = [first, first.max(before_end)];
        let free = free.into_iter().find(|at| apart(*at) && at + name.len() <= old.len());
        let any = (end + name.len() <= old.len()).then_some((end, false));
        free.map(|at| (at, true)).or(any)
    }

    fn too_long(&self, storage: &dyn Storage) -> Error {
        Error::Invalid(format!(
            "Image '{}': the backing file's name and the header's extensions do not fit {} bytes",
            storage.name(),
            self.geometry.cluster_size()
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::header::Header;
    use crate::qcow2::{Probe, Qcow2};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;
    use crate::{Progress, WriteBuf};

    /// An image whose backing file's name is `name`.
    fn image(name: &[u8]) -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::default());
        let options = CreateOptions {
            size: 1 << 20,
            backing_file: Some("x".repeat(name.len())),
            backing_fmt: (!name.is_empty()).then(|| "raw".to_owned()),
            ..CreateOptions::default()
        };
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let at = Header::read(&*storage).unwrap().backing_offset;
        storage.write_at(at, &[WriteBuf::new(name)]).unwrap();
        storage
    }

    /// The backing file's name as it is in the image.
    fn name(storage: &MemoryStorage) -> Vec<u8> {
        let bytes = storage.bytes();
        let at = usize::try_from(u64::from_be_bytes(bytes[8..16].try_into().unwrap())).unwrap();
        let len = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        bytes[at..at + len].to_vec()
    }

    #[test]
    fn a_backing_name_that_is_not_utf8_stays_byte_for_byte_until_it_is_changed() {
        let old = b"caf\xe9/\xff\xfe.raw";
        let storage = image(old);
        let all: Arc<dyn Storage> = storage.clone();
        let image = Qcow2::open(Probe::new(all).unwrap(), None, false).unwrap();
        assert_eq!(image.info().backing_file.unwrap(), String::from_utf8_lossy(old));
        let extension = Some(vec![7; 16]);
        image.meta().update_header(|header| header.set_extension(0x1234_5678, extension)).unwrap();
        assert_eq!(name(&storage), old);
        let read = Header::read(&*storage).unwrap();
        assert_eq!(read.extension(0x1234_5678), Some(&[7; 16][..]));
        image.set_backing(Some("new.raw"), Some("raw")).unwrap();
        assert_eq!(name(&storage), b"new.raw");
        image.set_backing(None, None).unwrap();
        assert!(name(&storage).is_empty());
        assert_eq!(Header::read(&*storage).unwrap().backing_file, None);
    }

    #[test]
    fn after_a_failed_flush_the_header_is_written_again_though_it_looks_the_same() {
        let storage = image(b"");
        let all: Arc<dyn Storage> = storage.clone();
        let image = Qcow2::open(Probe::new(all).unwrap(), None, false).unwrap();
        let mut meta = image.meta();
        let has = |bytes: Vec<u8>| {
            let header = Header::read(&MemoryStorage::new(bytes)).unwrap();
            header.extension(0x1234_5678).is_some()
        };
        let set = |header: &mut Header| header.set_extension(0x1234_5678, Some(vec![7; 16]));
        // A flush ends each.
        let count = |what: &mut dyn FnMut()| {
            let changes = storage.changes();
            what();
            storage.changes() - changes
        };
        let writes = count(&mut || meta.update_header(set).unwrap()) - 1;
        assert!(writes > 0);
        meta.update_header(|header| header.set_extension(0x1234_5678, None)).unwrap();
        assert!(!has(storage.flushed_bytes()));

        storage.fail_after(Some(writes), false);
        meta.update_header(set).unwrap_err();
        assert!(has(storage.bytes()), "written, not flushed");
        // The way back is written, and its flush fails too.
        let mut back = 1;
        loop {
            storage.fail_after(Some(back), false);
            meta.settle_header().unwrap_err();
            if !has(storage.bytes()) {
                break;
            }
            back += 1;
        }
        storage.fail_after(None, false);
        assert!(count(&mut || meta.settle_header().unwrap()) >= 2, "a write and a flush");
        assert!(!has(storage.flushed_bytes()));
        assert_eq!(count(&mut || meta.settle_header().unwrap()), 0);
    }
}
