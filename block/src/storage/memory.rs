//! Storage in memory, for tests: it can fail any operation and tells what was done to it.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Storage;
use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::{Error, ReadBuf, Result, WriteBuf};

/// One operation as it reached the storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Offset and length of a read.
    Read(u64, u64),
    /// Offset and length of a write.
    Write(u64, u64),
    /// A flush.
    Flush,
    /// The new length.
    SetLen(u64),
    /// Offset and length of a range given back.
    Discard(u64, u64),
    /// Offset and length of a range zeroed.
    Zero(u64, u64),
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// The bytes as of the last flush: what a power failure would leave, if nothing more got out.
    flushed: Vec<u8>,
    capacity: Option<u64>,
    /// Operations that change something still to succeed before all fail; `None` for no limit.
    fuse: Option<u64>,
    /// Whether only the one operation fails and later ones succeed.
    fail_once: bool,
    failed: bool,
    changes: u64,
    record: Option<Vec<Op>>,
}

/// A byte array with fault injection.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    state: Mutex<State>,
    before_read: Mutex<Option<Hook<u64>>>,
    before_flush: Mutex<Option<Hook<()>>>,
}

struct Hook<T>(Arc<dyn Fn(T) + Send + Sync>);

impl<T> Hook<T> {
    fn set(place: &Mutex<Option<Self>>, hook: impl Fn(T) + Send + Sync + 'static) {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(Self(Arc::new(hook)));
    }

    /// Outside the lock: a hook may wait.
    fn call(place: &Mutex<Option<Self>>, with: T) {
        let hook =
            place.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|h| h.0.clone());
        if let Some(hook) = hook {
            hook(with);
        }
    }
}

impl<T> Debug for Hook<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

impl MemoryStorage {
    /// Storage that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let state = State { flushed: bytes.clone(), bytes, ..State::default() };
        Self { state: Mutex::new(state), ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the contents.
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// A copy of the contents as of the last flush.
    pub fn flushed_bytes(&self) -> Vec<u8> {
        self.state().flushed.clone()
    }

    /// Growth beyond `capacity` bytes fails with ENOSPC.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        self.state().capacity = capacity;
    }

    /// After `n` more changing operations (writes, flushes, ...) all of them fail, or only one with
    /// `once`. `None` takes the limit away.
    pub fn fail_after(&self, n: Option<u64>, once: bool) {
        let mut state = self.state();
        state.fuse = n;
        state.fail_once = once;
        state.failed = false;
    }

    /// Whether an injected failure was met since the last [`MemoryStorage::fail_after`].
    pub fn failed(&self) -> bool {
        self.state().failed
    }

    /// Has every flush call `hook` first, which may wait, or fail the storage.
    pub fn before_flush(&self, hook: impl Fn() + Send + Sync + 'static) {
        Hook::set(&self.before_flush, move |()| hook());
    }

    /// Has every read call `hook` first, with its offset, which may wait.
    pub fn before_read(&self, hook: impl Fn(u64) + Send + Sync + 'static) {
        Hook::set(&self.before_read, hook);
    }

    /// How many changing operations succeeded so far.
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// Starts recording.
    pub fn record(&self) {
        self.state().record = Some(Vec::new());
    }

    /// What was done since [`MemoryStorage::record`]; ends recording.
    pub fn recorded(&self) -> Vec<Op> {
        self.state().record.take().unwrap_or_default()
    }
}

impl State {
    fn note(&mut self, op: Op) {
        if let Some(record) = &mut self.record {
            record.push(op);
        }
    }

    fn error(operation: &'static str, offset: u64, errno: i32) -> Error {
        Error::Io {
            operation,
            filename: "memory".to_owned(),
            offset,
            source: io::Error::from_raw_os_error(errno),
        }
    }

    /// Counts a change; fails it if the fuse is burnt.
    fn change(&mut self, operation: &'static str, offset: u64) -> Result<()> {
        match &mut self.fuse {
            Some(0) => {
                self.failed = true;
                if self.fail_once {
                    self.fuse = None;
                }
                return Err(Self::error(operation, offset, libc::EIO));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        self.changes += 1;
        Ok(())
    }

    fn grow(&mut self, operation: &'static str, end: u64) -> Result<()> {
        if self.capacity.is_some_and(|capacity| end > capacity) {
            return Err(Self::error(operation, end, libc::ENOSPC));
        }
        if to_u64(self.bytes.len()) < end {
            self.bytes.resize(to_usize(end), 0);
        }
        Ok(())
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> &str {
        "memory"
    }

    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        Hook::call(&self.before_read, offset);
        let mut state = self.state();
        state.note(Op::Read(offset, iobuf::total_len(bufs)));
        iobuf::fill_zero(bufs);
        if let Some(data) = state.bytes.get(to_usize(offset)..) {
            iobuf::copy_in(bufs, data);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        let mut state = self.state();
        state.note(Op::Write(offset, len));
        state.change("write", offset)?;
        state.grow("write", offset + len)?;
        iobuf::copy_out(bufs, &mut state.bytes[to_usize(offset)..]);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Hook::call(&self.before_flush, ());
        let mut state = self.state();
        state.note(Op::Flush);
        state.change("flush", 0)?;
        let now = state.bytes.clone();
        state.flushed = now;
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(to_u64(self.state().bytes.len()))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut state = self.state();
        state.note(Op::SetLen(len));
        state.change("truncate", len)?;
        state.grow("truncate", len)?;
        state.bytes.truncate(to_usize(len));
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let mut state = self.state();
        state.note(Op::Discard(offset, len));
        state.change("discard", offset)?;
        // Contents are undefined afterwards: make wrong use of them visible.
        let end = to_usize(offset + len).min(state.bytes.len());
        if let Some(range) = state.bytes.get_mut(to_usize(offset)..end) {
            range.fill(0xdd);
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let mut state = self.state();
        state.note(Op::Zero(offset, len));
        state.change("write zeroes", offset)?;
        state.grow("write zeroes", offset + len)?;
        state.bytes[to_usize(offset)..to_usize(offset + len)].fill(0);
        Ok(())
    }

    fn allocated(&self) -> Result<u64> {
        self.len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn zero_past_end(&self) -> bool {
        true
    }
}
