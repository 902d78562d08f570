//! The raw format, and the protocol node below every image: bytes as they are in the file.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::Format;
use crate::iobuf;
use crate::queue::Located;
use crate::status::StatusExtent;
use crate::storage::{FileStorage, Storage};
use crate::{Error, Preallocation, Progress, ReadBuf, Result, WriteBuf};

/// What guests count in, in bytes.
const SECTOR: u64 = 512;

/// An image without a format.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<dyn Storage>,
    driver: &'static str,
    /// Whether the size is that of the file at any time.
    follows_file: bool,
    /// Where in the storage the disk starts, in bytes.
    offset: u64,
    size: AtomicU64,
    /// The options say the size.
    fixed: bool,
    read_only: bool,
    unmap: bool,
}

impl Raw {
    /// Opens storage as a disk of its length, rounded up to whole 512-byte sectors as guests see.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> Result<Self> {
        Self::window(storage, None, None, read_only)
    }

    /// Opens a part of a storage as a disk: from `offset` on, `size` bytes or up to the end.
    ///
    /// # Errors
    /// The part is not in the storage; with QEMU's text.
    pub fn window(
        storage: Arc<dyn Storage>,
        offset: Option<u64>,
        size: Option<u64>,
        read_only: bool,
    ) -> Result<Self> {
        let len = storage.len()?;
        let invalid = |text| Err(Error::Invalid(text));
        if size.is_some_and(|size| !size.is_multiple_of(SECTOR)) {
            return invalid(format!("Specified size is not multiple of {SECTOR}"));
        }
        let start = offset.unwrap_or(0);
        if start > len {
            return invalid(format!(
                "Offset ({start}) cannot be greater than size of the containing file ({len})"
            ));
        }
        let fixed = size.is_some();
        let size = match size {
            Some(size) if size > len - start => {
                return invalid(format!(
                    "The sum of offset ({start}) and size ({size}) has to be smaller or equal to the  actual size of the containing file ({len})"
                ));
            }
            Some(size) => size,
            None => (len - start).next_multiple_of(SECTOR),
        };
        let follows_file = false;
        Ok(Self {
            storage,
            driver: "raw",
            follows_file,
            offset: start,
            size: AtomicU64::new(size),
            fixed,
            read_only,
            unmap: true,
        })
    }

    /// The protocol node of a file: `driver` is "file" or "host_device".
    pub fn protocol(
        storage: Arc<dyn Storage>,
        driver: &'static str,
        read_only: bool,
    ) -> Result<Self> {
        Ok(Self { driver, follows_file: true, ..Self::open(storage, read_only)? })
    }

    /// Whether discards reach the file (QEMU's `discard=unmap`) or do nothing.
    #[must_use]
    pub(crate) fn with_discard(mut self, unmap: bool) -> Self {
        self.unmap = unmap;
        self
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly(self.storage.name().to_owned()));
        }
        self.check(offset, len)
    }
}

impl Format for Raw {
    fn driver(&self) -> &'static str {
        self.driver
    }

    fn size(&self) -> u64 {
        // Below a format the file grows.
        if self.follows_file {
            return self
                .storage
                .len()
                .map_or(self.size.load(Ordering::Acquire), |len| len.next_multiple_of(SECTOR));
        }
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.check(offset, iobuf::total_len(bufs))?;
        self.storage.read_at(self.offset + offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.check_write(offset, iobuf::total_len(bufs))?;
        self.storage.write_at(self.offset + offset, bufs)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.check(offset, len)?;
        // A file with a hole in every page must not keep a caller waiting.
        const MAX_EXTENTS: usize = 2048;
        let (mut at, end) = (offset, offset + len);
        let mut list = Vec::new();
        while at < end && list.len() < MAX_EXTENTS {
            let (data, n) = self.storage.find_data(self.offset + at, end - at)?;
            let n = n.clamp(1, end - at);
            let extent = if data { StatusExtent::data(n) } else { StatusExtent::zero(n) };
            extent.push_to(&mut list);
            at += n;
        }
        Ok(list)
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    /// The file gets its new length and space, durably, before requests may use it.
    fn resize(&self, size: u64, mode: Preallocation, progress: &Progress) -> Result<()> {
        let refuse = |text: &str| Err(Error::Invalid(text.to_owned()));
        if self.read_only {
            return Err(Error::ReadOnly(self.storage.name().to_owned()));
        }
        if self.fixed {
            return refuse("Cannot resize fixed-size raw disks");
        }
        if mode == Preallocation::Metadata {
            return refuse("Unsupported preallocation mode 'metadata'");
        }
        if size > i64::MAX as u64 - self.offset {
            return refuse("The requested size is too large");
        }
        let (old, end) = (self.storage.len()?, self.offset + size);
        if end != old && self.storage.file().is_some_and(FileStorage::is_device) {
            return refuse("Cannot resize device files");
        }
        if end < old {
            if mode != Preallocation::Off {
                return refuse("Preallocation can't be used for shrinking files");
            }
            // Nobody is to write behind the new end any more, and where the file keeps its length, again.
            let before = self.size.swap(size, Ordering::AcqRel);
            self.storage
                .set_len(end)
                .inspect_err(|_| self.size.store(before, Ordering::Release))?;
        } else {
            mode.take(&*self.storage, old, end - old, progress)?;
        }
        self.storage.flush()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn locate_read(&self, offset: u64, len: u64, out: &mut Located) -> bool {
        if self.check(offset, len).is_err() {
            return false;
        }
        out.push_storage(&self.storage, self.offset + offset, len);
        true
    }

    fn locate_write(&self, offset: u64, len: u64, out: &mut Located) -> bool {
        if self.check_write(offset, len).is_err() {
            return false;
        }
        out.push_storage(&self.storage, self.offset + offset, len);
        true
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len)?;
        if !self.unmap {
            return Ok(());
        }
        self.storage.discard(self.offset + offset, len)
    }

    fn fast_zeroes(&self) -> bool {
        self.storage.fast_zeroes()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_write(offset, len)?;
        self.storage.write_zeroes(self.offset + offset, len, unmap && self.unmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::{FileOptions, FileStorage};

    #[test]
    fn the_status_of_a_part_of_a_file_is_of_that_part() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let storage = Arc::new(FileStorage::open(file.path(), FileOptions::default()).unwrap());
        storage.set_len(4 << 20).unwrap();
        storage.write_at(3 << 20, &[WriteBuf::new(&[1; 4096])]).unwrap();
        let part = Raw::window(storage, Some(2 << 20), None, true).unwrap();
        let list = part.block_status(0, 2 << 20).unwrap();
        assert_eq!(list[0], StatusExtent::zero(1 << 20));
        assert!(list[1].data && list[1].len >= 4096, "{list:?}");
    }

    #[test]
    fn a_disk_whose_file_cannot_be_cut_keeps_its_size() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 1 << 20]));
        let disk = Raw::open(storage.clone(), false).unwrap();
        let shrink = || disk.resize(1 << 19, Preallocation::Off, &Progress::default());
        storage.fail_after(Some(0), true);
        shrink().unwrap_err();
        assert_eq!((disk.size(), storage.len().unwrap()), (1 << 20, 1 << 20));
        shrink().unwrap();
        assert_eq!((disk.size(), storage.len().unwrap()), (1 << 19, 1 << 19));
    }
}
