//! Which pages of this process were ever touched, from `/proc/self/pagemap`.
//!
//! Looking at an untouched page would make the host allocate page tables for it; a guest that uses
//! a tenth of its RAM is scanned ten times faster without.
//!
//! An untouched page is zero only if it is not *missing* ([`crate::fault`]): whoever asks here must
//! have seen to it that nothing is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::units::{PAGE, index};

/// Bits 63 (present) and 62 (swapped) of an entry; see the kernel's admin-guide/mm/pagemap.
const TOUCHED: u64 = 0b11 << 62;
const ENTRY: u64 = 8;

/// The map of this process's pages.
pub(crate) struct Pagemap(File);

impl Pagemap {
    /// Opens the map; a sandbox may forbid it.
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Whether each of the `pages` pages from the page-aligned host address `host` has contents of
    /// its own. For anonymous private memory, a page without reads as zeroes.
    pub(crate) fn touched(&self, host: *const u8, pages: u64) -> io::Result<Vec<bool>> {
        let mut entries = vec![0; index(pages * ENTRY)];
        let first = host.addr() as u64 / PAGE;
        self.0.read_exact_at(&mut entries, first * ENTRY)?;
        let (entries, _) = entries.as_chunks::<8>();
        let touched = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & TOUCHED != 0;
        Ok(entries.iter().map(touched).collect())
    }
}
