//! A sparse file in memory, bounded.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::storage::Storage;
use block::{Error, ReadBuf, Result, WriteBuf};

const PAGE: u64 = 4096;
/// Most pages that hold data: 48 MiB.
const MAX_PAGES: usize = 12288;
/// Longest file, as on many file systems.
const MAX_LEN: u64 = 16 << 40;

#[derive(Debug, Default)]
struct State {
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

/// A sparse file in memory whose size is bounded.
#[derive(Debug, Default)]
pub struct Sparse {
    state: Mutex<State>,
}

impl Sparse {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts bytes in place.
    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state();
        state.put(offset, bytes).expect("the image of an input is within the limits");
        state.len = state.len.max(offset + bytes.len() as u64);
    }

    /// Sets the length.
    pub fn put_len(&self, len: u64) {
        self.state().len = len;
    }

    /// All bytes; for files that are known to be small.
    pub fn bytes(&self) -> Vec<u8> {
        let state = self.state();
        let mut bytes = vec![0; to_usize(state.len)];
        state.get(0, &mut bytes);
        bytes
    }

    /// Another file with the same contents.
    #[must_use]
    pub fn copy(&self) -> Self {
        let state = self.state();
        let copy = State { pages: state.pages.clone(), len: state.len };
        Self { state: Mutex::new(copy) }
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

fn error(operation: &'static str, offset: u64, errno: i32) -> Error {
    let source = io::Error::from_raw_os_error(errno);
    Error::Io { operation, filename: "memory".to_owned(), offset, source }
}

const ENOSPC: i32 = 28;
const EFBIG: i32 = 27;

impl State {
    fn get(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let end = offset.saturating_add(out.len() as u64).min(self.len);
        if offset >= end {
            return;
        }
        for (page, bytes) in self.pages.range(offset / PAGE..=(end - 1) / PAGE) {
            let start = page * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            out[to_usize(from - offset)..to_usize(to - offset)]
                .copy_from_slice(&bytes[to_usize(from - start)..to_usize(to - start)]);
        }
    }

    fn put(&mut self, offset: u64, mut bytes: &[u8]) -> Result<()> {
        let mut at = offset;
        while !bytes.is_empty() {
            let room = to_usize(PAGE - at % PAGE).min(bytes.len());
            let (part, rest) = bytes.split_at(room);
            if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&(at / PAGE)) {
                return Err(error("write", at, ENOSPC));
            }
            let page =
                self.pages.entry(at / PAGE).or_insert_with(|| vec![0; to_usize(PAGE)].into());
            page[to_usize(at % PAGE)..][..room].copy_from_slice(part);
            at += room as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn fill(&mut self, offset: u64, end: u64, value: u8) {
        let end = end.min(self.len);
        if offset >= end {
            return;
        }
        for (page, bytes) in self.pages.range_mut(offset / PAGE..=(end - 1) / PAGE) {
            let start = page * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            bytes[to_usize(from - start)..to_usize(to - start)].fill(value);
        }
    }

    fn grow(&mut self, operation: &'static str, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= MAX_LEN);
        let end = end.ok_or_else(|| error(operation, offset, EFBIG))?;
        self.len = self.len.max(end);
        Ok(())
    }
}

impl Storage for Sparse {
    fn name(&self) -> &str {
        "memory"
    }

    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        let state = self.state();
        let mut at = offset;
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            state.get(at, &mut bytes);
            // SAFETY: the buffer is valid for writes of its length, and nothing else refers to it
            // or to the new bytes.
            unsafe { buf.as_mut_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            at = at.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let mut state = self.state();
        let mut at = offset;
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            // SAFETY: the buffer is valid for reads of its length; the new bytes are apart.
            unsafe { buf.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
            state.grow("write", at, bytes.len() as u64)?;
            state.put(at, &bytes)?;
            at += bytes.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.state().len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut state = self.state();
        state.grow("truncate", len, 0)?;
        // What is beyond the new end must not come back when the file grows again.
        let old = state.len;
        state.fill(len, old, 0);
        state.pages.split_off(&len.div_ceil(PAGE));
        state.len = len;
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        // Contents are undefined afterwards: make wrong use of them visible.
        self.state().fill(offset, offset.saturating_add(len), 0xdd);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let mut state = self.state();
        state.grow("write zeroes", offset, len)?;
        state.fill(offset, offset + len, 0);
        Ok(())
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.state().pages.len() as u64 * PAGE)
    }

    fn read_only(&self) -> bool {
        false
    }
}
