//! Moving bytes between memory and a file: by the page cache or past it, in as many calls as it takes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::super::sys;
use super::FileStorage;
use crate::iobuf::{self, Vectored};
use crate::num::{to_u64, to_usize};
use crate::{ReadBuf, WriteBuf};

impl FileStorage {
    /// How much of so many bytes one call is given.
    pub(crate) fn at_once(&self, len: u64) -> u64 {
        self.options.transfer_limit.map_or(len, |most| len.min(most.get().into()))
    }

    /// The descriptor for a transfer, and whether it bypasses the page cache: all do with
    /// `cache.direct` where alignment allows, unless the file system `refused` it.
    pub(crate) fn descriptor<'a>(
        &self,
        offset: u64,
        mut parts: impl Iterator<Item = (*const u8, usize)> + 'a,
        refused: bool,
    ) -> (BorrowedFd<'_>, bool) {
        match &self.direct {
            Some(direct)
                if self.options.direct
                    && !refused
                    && offset.is_multiple_of(to_u64(sys::DIRECT_ALIGN))
                    && sys::aligned(&mut parts) =>
            {
                (direct.as_fd(), true)
            }
            _ => (self.file.as_fd(), false),
        }
    }

    /// The descriptor for a direct transfer, if alignment allows one.
    fn direct_for<T: Vectored>(&self, offset: u64, bufs: &[T]) -> Option<&File> {
        let direct = self.direct.as_ref()?;
        let fits = offset.is_multiple_of(to_u64(sys::DIRECT_ALIGN))
            && sys::aligned(bufs.iter().map(Vectored::part));
        fits.then_some(direct)
    }

    pub(super) fn read_from(
        &self,
        file: &File,
        offset: u64,
        bufs: &[ReadBuf<'_>],
    ) -> io::Result<()> {
        let total = iobuf::total_len(bufs);
        let mut done = 0;
        while done < total {
            let rest = iobuf::slice_read(bufs, done, self.at_once(total - done));
            match sys::retry(|| sys::preadv(file.as_fd(), &rest, offset + done))? {
                0 => {
                    iobuf::fill_zero(&iobuf::slice_read(bufs, done, total - done));
                    break;
                }
                n => done += n,
            }
        }
        Ok(())
    }

    pub(super) fn write_to(
        &self,
        file: &File,
        offset: u64,
        bufs: &[WriteBuf<'_>],
    ) -> io::Result<()> {
        let total = iobuf::total_len(bufs);
        self.wrote_up_to(offset + total);
        let mut done = 0;
        while done < total {
            let now = self.at_once(total - done);
            let n = if now == total {
                sys::retry(|| sys::pwritev(file.as_fd(), bufs, offset))?
            } else {
                let rest = iobuf::slice_write(bufs, done, now);
                sys::retry(|| sys::pwritev(file.as_fd(), &rest, offset + done))?
            };
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done += n;
        }
        Ok(())
    }

    /// A transfer that goes direct where it can.
    pub(super) fn bulk<T: Vectored>(
        &self,
        offset: u64,
        bufs: &[T],
        transfer: impl Fn(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        if let Some(direct) = self.direct_for(offset, bufs) {
            match transfer(direct) {
                // The file system refuses, or the file ends off the block grid and the transfer had
                // to go on unaligned.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                other => return other,
            }
        }
        transfer(&self.file)
    }

    /// As [`crate::storage::Storage::read_cached`].
    pub(super) fn copy_cached(&self, offset: u64, bytes: &mut [u8]) -> bool {
        // A file that is to bypass the page cache is not looked for there.
        if self.options.direct {
            return false;
        }
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset + to_u64(done);
            let now = to_usize(self.at_once(to_u64(rest.len())));
            let part = &mut rest[..now];
            match sys::retry(|| sys::preadv_cached(self.file.as_fd(), &[ReadBuf::new(part)], at)) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => done += to_usize(n),
                Err(_) => return false,
            }
        }
        true
    }
}
