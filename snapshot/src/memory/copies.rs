//! Copies of guest pages.

use std::ptr;

use super::RamSlice;
use crate::track::PageRun;
use crate::units::{PAGE, index};

/// Memory of one page, aligned as direct I/O wants it.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; index(PAGE)]);

/// Pages of our own.
pub(crate) struct Copies(Vec<Page>);

impl Copies {
    /// So many pages of zeroes; they are touched, so that the host need not find memory later.
    pub(crate) fn room(pages: u64) -> Self {
        Self(vec![Page([0; index(PAGE)]); index(pages)])
    }

    /// Copies of a run.
    pub(crate) fn of(ram: &[RamSlice<'_>], run: PageRun) -> Self {
        let mut copies = Self::room(run.count);
        copies.fill(0, ram, run);
        copies
    }

    /// As many pages as told; what was there stays.
    pub(crate) fn resize(&mut self, pages: u64) {
        self.0.resize(index(pages), Page([0; index(PAGE)]));
    }

    /// Copies a run to the pages from `at`. What others write to it meanwhile comes in part.
    pub(crate) fn fill(&mut self, at: u64, ram: &[RamSlice<'_>], run: PageRun) {
        let from = ram[run.region].host(run.offset(), run.len());
        let to = self.0[index(at)..index(at + run.count)].as_mut_ptr();
        // SAFETY: `host` checked the source, which is mapped; the slice is that many pages of our
        // own. No Rust reference to guest memory exists.
        unsafe { ptr::copy_nonoverlapping(from, to.cast(), index(run.len())) };
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: a page is its bytes and nothing else, and they are initialised.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(&*self.0)) }
    }

    /// The bytes of a range of pages.
    pub(crate) fn bytes_of(&self, first: u64, count: u64) -> &[u8] {
        &self.bytes()[index(first * PAGE)..index((first + count) * PAGE)]
    }
}
