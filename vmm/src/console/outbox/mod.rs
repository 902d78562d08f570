//! Output of the guest on its way to whoever reads it.
//!
//! ```text
//!   vCPU ──────────────────> reader        while it reads
//!     │                        ^
//!     └──> kept, up to 1 MiB ──┘           otherwise; the event loop hands it over when the reader takes some
//! ```
//!
//! A guest writes byte by byte, and a socket has room for some 300 such writes, so a reader that has not had a
//! CPU for some milliseconds would lose output without what is kept here. Where that is full the vCPU waits for
//! [`PATIENCE`], then bytes are dropped, and no more is waited until the reader takes something: a guest whose
//! reader has stopped is not slowed down for each byte.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{is_transient, writable_within};

/// How long output waits for a reader that does not read before it is dropped.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

/// How long the end of the machine may wait for a reader of what is kept.
const PATIENCE_AT_END: Duration = Duration::from_secs(5);

/// Bytes that are kept at most.
pub(super) const MOST_KEPT: usize = 1 << 20;

/// Takes bytes when it can, and never waits.
pub(super) trait Reader: AsRawFd + Send + Sync {
    /// Takes some of the bytes; tells how many.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it takes none now; another error if it never will.
    fn offer(&self, bytes: &[u8]) -> io::Result<usize>;
}

/// See the module. The vCPU and the event loop have it together; its lock is held for what does not wait.
pub(super) struct Outbox {
    reader: Box<dyn Reader>,
    state: Mutex<State>,
    /// Told when there is something for the event loop to hand over.
    waits: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    kept: VecDeque<u8>,
    /// It took nothing for so long that bytes were dropped.
    stuck: bool,
    /// It takes nothing any more.
    gone: bool,
}

impl Outbox {
    /// A way to `reader`; `waits` is told when output waits for it.
    pub(super) fn new(reader: Box<dyn Reader>, waits: Arc<EventFd>) -> Self {
        Self { reader, state: Mutex::default(), waits }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be watched for room while something is kept.
    pub(super) fn fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }

    /// Hands over, keeps or, at worst, drops the bytes.
    pub(super) fn write(&self, bytes: &[u8]) {
        let mut rest = bytes;
        let mut deadline = None;
        loop {
            let mut state = self.state();
            rest = self.put(&mut state, rest);
            if rest.is_empty() || state.stuck || state.gone {
                return;
            }
            drop(state);
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !writable_within(self.fd(), left) {
                self.state().stuck = true;
                return;
            }
        }
    }

    /// Gives what there is no room for.
    fn put<'b>(&self, state: &mut State, bytes: &'b [u8]) -> &'b [u8] {
        let mut rest = bytes;
        if state.kept.len() >= MOST_KEPT {
            self.send(state);
        }
        while state.kept.is_empty() && !state.gone && !rest.is_empty() {
            match self.offer(state, rest) {
                0 => break,
                count => rest = &rest[count..],
            }
        }
        if state.gone {
            return &[];
        }
        let (now, later) = rest.split_at(rest.len().min(MOST_KEPT - state.kept.len()));
        if !now.is_empty() && state.kept.is_empty() {
            // The only way to fail is a counter at its limit, which wakes too.
            let _ = self.waits.write(1);
        }
        state.kept.extend(now);
        later
    }

    /// How many bytes the reader took.
    fn offer(&self, state: &mut State, bytes: &[u8]) -> usize {
        loop {
            match self.reader.offer(bytes) {
                Ok(count) => {
                    state.stuck &= count == 0;
                    return count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_transient(&error) => return 0,
                // The event loop sees it too, and forgets the reader.
                Err(_) => {
                    state.gone = true;
                    state.kept = VecDeque::new();
                    return 0;
                }
            }
        }
    }

    /// Hands over as much of what is kept as the reader takes.
    fn send(&self, state: &mut State) {
        while !state.kept.is_empty() {
            let kept = std::mem::take(&mut state.kept);
            let count = self.offer(state, kept.as_slices().0);
            if state.gone {
                return;
            }
            state.kept = kept;
            state.kept.drain(..count);
            if count == 0 {
                return;
            }
        }
        // With its memory.
        state.kept = VecDeque::new();
    }

    /// Hands over what the reader takes now; tells whether something is left.
    pub(super) fn send_kept(&self) -> bool {
        let mut state = self.state();
        self.send(&mut state);
        !state.kept.is_empty()
    }

    /// The machine ends: waits for the reader, but not for ever.
    pub(super) fn finish(&self) {
        let deadline = Instant::now() + PATIENCE_AT_END;
        while self.send_kept() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !writable_within(self.fd(), left) {
                tracing::warn!("output of the guest is lost: nobody reads it");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
