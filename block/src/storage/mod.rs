//! Where an image's bytes are kept: a host file, or memory in tests.

use std::fmt::Debug;

use crate::{ReadBuf, Result, WriteBuf};

mod file;
pub mod memory;
pub(crate) mod sys;

pub(crate) use file::Highest;
pub use file::{Aio, Discards, FileOptions, FileStorage, Locking};
pub use sys::raise_descriptor_limit;
pub(crate) use sys::{ofd_lock_held, ofd_lock_shared};

/// A growable array of bytes with durable writes. Offsets and lengths are host bytes.
///
/// All methods may be called from several threads at once. Requests that overlap are not ordered.
pub trait Storage: Send + Sync + Debug {
    /// The name the user knows the storage by, for messages.
    fn name(&self) -> &str;

    /// Reads `bufs` one after another from `offset`; what lies past the end reads as zeroes.
    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()>;

    /// Writes `bufs` one after another at `offset`, growing the storage where needed.
    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()>;

    /// Makes every completed write, and the length, durable.
    fn flush(&self) -> Result<()>;

    /// The length in bytes.
    fn len(&self) -> Result<u64>;

    /// Whether there are no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends (with zeroes) to `len` bytes.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Gives the host's space of the range back, best effort: the contents are undefined afterwards.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Whether [`Storage::write_zeroes`] is faster than writing zeroes, as far as is known.
    fn fast_zeroes(&self) -> bool {
        true
    }

    /// Bytes the host really uses.
    fn allocated(&self) -> Result<u64>;

    /// As [`Storage::read_at`] for large transfers that are not read again soon: the host's page
    /// cache is bypassed where alignment and file system allow.
    fn read_bulk(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.read_at(offset, bufs)
    }

    /// As [`Storage::write_at`] for large transfers; see [`Storage::read_bulk`].
    fn write_bulk(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.write_at(offset, bufs)
    }

    /// Reads what memory has, zeroes past the end, without waiting for a disk; says whether that was
    /// all. After `false` the buffer may have a part.
    fn read_cached(&self, _offset: u64, _bytes: &mut [u8]) -> bool {
        false
    }

    /// Takes host space for a range that is about to be written by [`Storage::write_bulk`], so that
    /// parallel writes need not extend the file one after another. The storage may grow to the end
    /// of the range; without support by the host nothing happens.
    fn reserve(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    /// Whether there is data at `offset`, as opposed to a hole that reads as zeroes, and for how many
    /// of the next `len` bytes that is so. Where the host cannot tell, all is data.
    fn find_data(&self, _offset: u64, len: u64) -> Result<(bool, u64)> {
        Ok((true, len))
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// The host file, for those who transfer by its descriptor.
    fn file(&self) -> Option<&FileStorage> {
        None
    }

    /// Whether what was never written since the storage was shorter reads as zeroes once it has
    /// grown over it. Not so for a block device.
    fn zero_past_end(&self) -> bool {
        false
    }
}
