//! A storage in memory that logs what is done to it and fails what it is told to fail.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use block::iobuf::{copy_in, copy_out, fill_zero};
use block::storage::Storage;
use block::{Error, ReadBuf, Result, WriteBuf};

use crate::pages::Pages;

/// A change of a file.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Write(usize, Arc<[u8]>),
    Zero(usize, usize),
    /// The bytes of the range are undefined afterwards.
    Discard(usize, usize),
    SetLen(usize),
    /// Space up to an end is taken.
    Grow(usize),
    Flush,
}

impl Change {
    /// First byte and length, for those that can be torn.
    pub(crate) fn span(&self) -> Option<(usize, usize)> {
        match self {
            Self::Write(at, bytes) => Some((*at, bytes.len())),
            Self::Zero(at, len) | Self::Discard(at, len) => Some((*at, *len)),
            _ => None,
        }
    }

    pub(crate) fn apply(&self, pages: &mut Pages) {
        match self {
            Self::SetLen(len) => pages.set_len(*len),
            Self::Grow(end) => pages.set_len(pages.len().max(*end)),
            _ => {
                if let Some((at, len)) = self.span() {
                    self.apply_part(pages, at, len);
                }
            }
        }
    }

    /// Applies what lies in a part of the span.
    pub(crate) fn apply_part(&self, pages: &mut Pages, at: usize, len: usize) {
        match self {
            Self::Write(start, bytes) => pages.write(at, &bytes[at - start..][..len]),
            Self::Zero(..) => pages.fill(at, len, 0),
            // Wrong use of what was discarded shall show.
            Self::Discard(..) => pages.fill(at, len.min(pages.len().saturating_sub(at)), 0xdd),
            _ => {}
        }
    }
}

/// An entry of the log: what was done to which file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) file: usize,
    pub(crate) change: Change,
}

/// The kinds of requests that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    SetLen,
    Discard,
    Zero,
    Reserve,
    Len,
}

/// What is to fail: the request of this number, counted from when the fault was set. ENOSPC is met
/// by requests that take space.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) at: u64,
    pub(crate) errno: i32,
    /// Whether all later requests of the kinds fail too.
    pub(crate) lasting: bool,
}

#[derive(Default)]
struct State {
    files: Vec<Pages>,
    log: Vec<Entry>,
    /// Requests since the fault was set that it could have been.
    requests: u64,
    fault: Option<Fault>,
    hits: Vec<Kind>,
    reached: Reached,
}

/// What of the data path was used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reached {
    /// Writes that begin past the end of a file: the hole before them reads as zeroes.
    pub(crate) past_end: u64,
    /// Reads of what is around a write, without waiting.
    pub(crate) cached: u64,
}

/// The disks of a host: the files of an image, with one log for all.
#[derive(Clone, Default)]
pub(crate) struct Host(Arc<Mutex<State>>);

impl Host {
    pub(crate) fn new(files: Vec<Pages>) -> Self {
        Self(Arc::new(Mutex::new(State { files, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// One of the files as storage.
    pub(crate) fn file(&self, file: usize) -> Arc<dyn Storage> {
        Arc::new(Recorder { host: self.clone(), file })
    }

    pub(crate) fn files(&self) -> Vec<Pages> {
        self.state().files.clone()
    }

    /// How many entries the log has.
    pub(crate) fn now(&self) -> usize {
        self.state().log.len()
    }

    pub(crate) fn log(&self) -> Vec<Entry> {
        self.state().log.clone()
    }

    pub(crate) fn reached(&self) -> Reached {
        self.state().reached
    }

    /// Starts counting requests anew; one of them fails.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        let mut state = self.state();
        state.fault = fault;
        state.hits.clear();
        state.requests = 0;
    }

    /// What failed since [`Host::set_fault`].
    pub(crate) fn hits(&self) -> Vec<Kind> {
        self.state().hits.clone()
    }
}

struct Recorder {
    host: Host,
    file: usize,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {} in memory", self.file)
    }
}

impl Recorder {
    /// Counts a request; fails it if its turn has come.
    fn request(
        &self,
        kind: Kind,
        operation: &'static str,
        at: u64,
    ) -> Result<MutexGuard<'_, State>> {
        let mut state = self.host.state();
        let Some(fault) = state.fault else { return Ok(state) };
        let takes_space = matches!(kind, Kind::Write | Kind::Zero | Kind::Reserve);
        if fault.errno == libc::ENOSPC && !takes_space {
            return Ok(state);
        }
        let number = state.requests;
        state.requests += 1;
        if number == fault.at || (fault.lasting && number > fault.at) {
            state.hits.push(kind);
            return Err(Error::Io {
                operation,
                filename: self.name().to_owned(),
                offset: at,
                source: io::Error::from_raw_os_error(fault.errno),
            });
        }
        Ok(state)
    }

    fn change(&self, mut state: MutexGuard<'_, State>, change: Change) {
        change.apply(&mut state.files[self.file]);
        state.log.push(Entry { file: self.file, change });
    }
}

fn total(lens: impl Iterator<Item = usize>) -> usize {
    lens.sum()
}

impl Storage for Recorder {
    fn name(&self) -> &str {
        ["memory", "memory-data"][self.file.min(1)]
    }

    fn read_at(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        let state = self.request(Kind::Read, "read", offset)?;
        let len = total(bufs.iter().map(ReadBuf::len));
        fill_zero(bufs);
        copy_in(bufs, &state.files[self.file].read(offset as usize, len));
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let mut state = self.request(Kind::Write, "write", offset)?;
        let mut bytes = vec![0; total(bufs.iter().map(WriteBuf::len))];
        copy_out(bufs, &mut bytes);
        state.reached.past_end += u64::from(offset as usize > state.files[self.file].len());
        self.change(state, Change::Write(offset as usize, bytes.into()));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let state = self.request(Kind::Flush, "flush", 0)?;
        self.change(state, Change::Flush);
        Ok(())
    }

    fn len(&self) -> Result<u64> {
        Ok(self.request(Kind::Len, "stat", 0)?.files[self.file].len() as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let state = self.request(Kind::SetLen, "truncate", len)?;
        self.change(state, Change::SetLen(len as usize));
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let state = self.request(Kind::Discard, "discard", offset)?;
        self.change(state, Change::Discard(offset as usize, len as usize));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let state = self.request(Kind::Zero, "write zeroes", offset)?;
        self.change(state, Change::Zero(offset as usize, len as usize));
        Ok(())
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.host.state().files[self.file].len() as u64)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        let state = self.request(Kind::Reserve, "allocate", offset)?;
        self.change(state, Change::Grow((offset + len) as usize));
        Ok(())
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_cached(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let mut state = self.host.state();
        bytes.copy_from_slice(&state.files[self.file].read(offset as usize, bytes.len()));
        state.reached.cached += 1;
        true
    }

    fn zero_past_end(&self) -> bool {
        true
    }
}
