//! A regular host file (or block device) as storage.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom;

use super::Storage;
use super::sys::{self, Allocate};
use crate::lock;
use crate::num::{to_u64, to_usize};
use crate::perm::Permissions;
use crate::{Error, ReadBuf, Result, WriteBuf};

mod counts;
mod options;
mod transfer;

use counts::Counters;
pub use counts::Discards;
pub(crate) use counts::Highest;
pub use options::{Aio, FileOptions, Locking};

/// A host file. A second descriptor with O_DIRECT carries bulk transfers: several times the speed
/// of the page cache for data that is written once. The kernel keeps both views coherent by
/// writing back and invalidating the cached pages of a range before a direct transfer of it.
#[derive(Debug)]
pub struct FileStorage {
    name: String,
    path: PathBuf,
    file: File,
    direct: Option<File>,
    options: FileOptions,
    device: bool,
    /// Set once a flush failed: the kernel drops the pages it could not write and a later flush
    /// would tell of success, so none is believed any more. Shared by what was opened again from one
    /// another: it is about the file's pages, and of two one may be given up.
    flush_failed: Arc<AtomicBool>,
    /// The host turned out to have no call that makes zeroes: they are written.
    plain_zeroes: AtomicBool,
    counters: Counters,
}

impl FileStorage {
    /// Opens an existing file and takes QEMU's image locks on it.
    ///
    /// # Errors
    /// [`Error::Open`] if the host refuses, [`Error::Locked`] if another process uses the image in
    /// a way that excludes ours.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self> {
        let storage = Self::open_unlocked(path, options)?;
        storage.widen_locks(Permissions::of_image(!options.read_only, options.force_share))?;
        Ok(storage)
    }

    /// As [`FileStorage::open`] without locks: the graph takes them as the node's users need.
    pub(crate) fn open_unlocked(path: impl AsRef<Path>, options: FileOptions) -> Result<Self> {
        let path = path.as_ref();
        let name = path.to_string_lossy().into_owned();
        let failed = |source| Error::Open { filename: name.clone(), source };
        let file = open_file(path, options, 0).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let text = format!("'file' driver requires '{name}' to be a regular file");
            return Err(Error::Invalid(text));
        }
        sys::set_blocking(file.as_fd()).map_err(failed)?;
        // The path may lead to another file by now, which nobody locked.
        let direct = open_file(path, options, libc::O_DIRECT);
        let direct = match direct.and_then(|direct| same_file(&file, direct)) {
            Ok(direct) => Some(direct),
            Err(e) if options.direct => return Err(failed(e)),
            Err(_) => None,
        };
        if let Some(direct) = &direct {
            sys::set_blocking(direct.as_fd()).map_err(failed)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            direct,
            options,
            device: kind.is_block_device(),
            flush_failed: Arc::default(),
            plain_zeroes: AtomicBool::new(false),
            counters: Counters::default(),
            name,
        })
    }

    /// The same file with other options, for a reopen. Takes the locks of `held` without a look at
    /// those of other processes: this storage must hold them, and be dropped afterwards, so that
    /// at no time the file is without them.
    pub(crate) fn reopen(&self, options: FileOptions, held: Permissions) -> Result<Self> {
        let failed = |source| Error::Open { filename: self.name.clone(), source };
        // Not by its name, which may lead to another file by now.
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let mut storage = Self::open_unlocked(&path, options).map_err(|error| match error {
            Error::Open { source, .. } => failed(source),
            other => other,
        })?;
        if options.locking != Locking::Off
            && let Err(e) = lock::add(storage.file.as_fd(), held)
            && options.locking == Locking::On
        {
            return Err(failed(e));
        }
        storage.name.clone_from(&self.name);
        storage.path.clone_from(&self.path);
        // What the kernel forgot stays forgotten.
        storage.flush_failed = self.flush_failed.clone();
        storage.counters = self.counters.copy();
        Ok(storage)
    }

    /// Takes the locks of `wanted` besides those that are held.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process contradicts; [`FileStorage::reduce_locks`] leads back.
    pub(crate) fn widen_locks(&self, wanted: Permissions) -> Result<()> {
        if self.options.locking == Locking::Off {
            return Ok(());
        }
        lock::take(self.file.as_fd(), &self.name, wanted, self.options.locking == Locking::On)
    }

    /// Gives up all locks but those of `kept`.
    pub(crate) fn reduce_locks(&self, kept: Permissions) {
        if self.options.locking == Locking::Off {
            return;
        }
        // An unlock fails only where locks are not supported, and then none was taken.
        if let Err(e) = lock::reduce(self.file.as_fd(), kept) {
            tracing::debug!(file = self.name, "locks are not given up: {e}");
        }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are one file of the host, by whatever names.
    ///
    /// # Errors
    /// The host does not tell.
    pub(crate) fn is_same_file(&self, other: &Self) -> Result<bool> {
        let identity = |storage: &Self| {
            let metadata = storage.file.metadata();
            metadata.map(|m| (m.dev(), m.ino())).map_err(|e| storage.error("stat", 0, e))
        };
        Ok(identity(self)? == identity(other)?)
    }

    /// How it was opened.
    pub fn options(&self) -> &FileOptions {
        &self.options
    }

    /// Whether it is a block device, which has the length that it has.
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// A write goes up to this byte, also by one who transfers by the descriptor.
    pub(crate) fn wrote_up_to(&self, end: u64) {
        self.counters.highest().wrote_up_to(end);
    }

    /// End of the highest write since it was opened, in bytes.
    pub fn highest_write(&self) -> u64 {
        self.counters.highest().get()
    }

    /// Its discards since it was opened.
    pub fn discards(&self) -> Discards {
        self.counters.discards()
    }

    fn error(&self, operation: &'static str, offset: u64, source: io::Error) -> Error {
        Error::Io { operation, filename: self.name.clone(), offset, source }
    }

    /// The result of a flush, remembered if it failed: with `cache.direct=on` too, where tables and
    /// unaligned data still go through the page cache.
    fn flushed(&self, result: io::Result<()>) -> Result<()> {
        result.map_err(|e| {
            self.flush_failed.store(true, Ordering::Release);
            self.error("flush", 0, e)
        })
    }

    /// Grows the file to `end` with zeroes. Never by its length: another write may make it longer
    /// at the same time and would be cut off. Gives the offset up to which it was there before.
    fn grow(&self, offset: u64, end: u64) -> Result<u64> {
        let len = self.len()?;
        let from = offset.max(len);
        if from < end && !self.device {
            match sys::fallocate(self.file.as_fd(), Allocate::Reserve, from, end - from) {
                Err(e) if unsupported(&e) => self.write_plain_zeroes(from, end - from)?,
                other => other.map_err(|e| self.error("write zeroes", from, e))?,
            }
        }
        Ok(from.min(end))
    }

    /// Writes zeroes where the host has no call for it.
    fn write_plain_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let zeroes = vec![0; to_usize(len.min(1 << 20))];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(to_u64(zeroes.len()));
            let part = WriteBuf::new(&zeroes[..to_usize(n)]);
            self.write_at(offset + done, &[part])?;
            done += n;
        }
        Ok(())
    }
}

fn open_file(path: &Path, options: FileOptions, flags: libc::c_int) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
}

/// The second descriptor, if it is of the same file as the first.
fn same_file(first: &File, second: File) -> io::Result<File> {
    let (a, b) = (first.metadata()?, second.metadata()?);
    if (a.dev(), a.ino()) == (b.dev(), b.ino()) {
        Ok(second)
    } else {
        Err(io::Error::other("the file was replaced while it was being opened"))
    }
}

/// Whether the host lacks the operation, as opposed to failing in it.
fn unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}

impl Storage for FileStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        if self.options.direct {
            return self.read_bulk(offset, bufs);
        }
        self.read_from(&self.file, offset, bufs).map_err(|e| self.error("read", offset, e))
    }

    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        if self.options.direct {
            return self.write_bulk(offset, bufs);
        }
        self.write_to(&self.file, offset, bufs).map_err(|e| self.error("write", offset, e))
    }

    fn read_bulk(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.bulk(offset, bufs, |file| self.read_from(file, offset, bufs))
            .map_err(|e| self.error("read", offset, e))
    }

    fn write_bulk(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.bulk(offset, bufs, |file| self.write_to(file, offset, bufs))
            .map_err(|e| self.error("write", offset, e))
    }

    fn flush(&self) -> Result<()> {
        if self.options.no_flush || self.options.read_only {
            return Ok(());
        }
        if self.flush_failed.load(Ordering::Acquire) {
            let reason = "an earlier flush failed, writes before it may be lost";
            return Err(self.error("flush", 0, io::Error::other(reason)));
        }
        self.flushed(self.file.sync_data())
    }

    fn len(&self) -> Result<u64> {
        if self.device {
            return rustix::fs::seek(&self.file, SeekFrom::End(0))
                .map_err(|e| self.error("seek", 0, e.into()));
        }
        Ok(self.file.metadata().map_err(|e| self.error("stat", 0, e))?.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.device {
            let there = self.len()?;
            if len > there {
                let name = &self.name;
                return Err(Error::Invalid(format!(
                    "Cannot grow device files: '{name}' has {there} bytes, not {len}"
                )));
            }
            return Ok(());
        }
        self.file.set_len(len).map_err(|e| self.error("truncate", len, e))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let result = sys::fallocate(self.file.as_fd(), Allocate::PunchHole, offset, len);
        self.counters.discarded(len, result.is_ok());
        match result {
            Err(e) if !unsupported(&e) => Err(self.error("discard", offset, e)),
            _ => Ok(()),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.wrote_up_to(offset + len);
        let len = self.grow(offset, offset + len)? - offset;
        if len == 0 {
            return Ok(());
        }
        let what = if unmap { Allocate::PunchHole } else { Allocate::Zero };
        match sys::fallocate(self.file.as_fd(), what, offset, len) {
            Ok(()) => Ok(()),
            Err(e) if unsupported(&e) => {
                self.plain_zeroes.store(true, Ordering::Relaxed);
                self.write_plain_zeroes(offset, len)
            }
            Err(e) => Err(self.error("write zeroes", offset, e)),
        }
    }

    fn fast_zeroes(&self) -> bool {
        !self.plain_zeroes.load(Ordering::Relaxed)
    }

    fn allocated(&self) -> Result<u64> {
        let meta = self.file.metadata().map_err(|e| self.error("stat", 0, e))?;
        Ok(meta.blocks().saturating_mul(512))
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        if self.device || len == 0 {
            return Ok(());
        }
        match sys::fallocate(self.file.as_fd(), Allocate::Reserve, offset, len) {
            Ok(()) => Ok(()),
            // The writes will grow the file.
            Err(e) if unsupported(&e) => Ok(()),
            Err(e) => Err(self.error("allocate", offset, e)),
        }
    }

    fn find_data(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let seek = |to| match rustix::fs::seek(&self.file, to) {
            // Nothing of the kind up to the end.
            Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
            other => other.map_err(|e| self.error("seek", offset, e.into())),
        };
        // The position this moves is used by nothing else.
        let data = match seek(SeekFrom::Data(offset)) {
            Err(_) if self.device => return Ok((true, len)),
            other => other?,
        };
        if data > offset {
            return Ok((false, len.min(data - offset)));
        }
        let hole = seek(SeekFrom::Hole(offset))?;
        // What is cut off meanwhile counts as data: that is always right.
        if hole <= offset { Ok((true, len)) } else { Ok((true, len.min(hole - offset))) }
    }

    fn read_only(&self) -> bool {
        self.options.read_only
    }

    fn file(&self) -> Option<&FileStorage> {
        Some(self)
    }

    fn read_cached(&self, offset: u64, bytes: &mut [u8]) -> bool {
        self.copy_cached(offset, bytes)
    }

    fn zero_past_end(&self) -> bool {
        !self.device
    }
}

#[cfg(test)]
mod tests;
