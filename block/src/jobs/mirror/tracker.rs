//! What of a mirror's source the target does not have yet, and writes that go to both.
//!
//! Every change of the source marks the parts it touched, once it is made; the job copies what is
//! marked. A part is unmarked before it is read: what is written while it is read marks it again.
//!
//! In the mode `write-blocking` a change has its parts to itself, no piece of the job and no other change
//! is at them, is made on the source and then on the target with the same bytes, and only then
//! completes. If the target takes it, the parts stay as they were, or unmarked where it wrote all of a
//! part; else they are marked and the job is told of the error.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::jobs::chunks::Chunks;
use crate::jobs::copy::{Copier, Failed, Kind, LOOK, Way};
use crate::jobs::{Control, Side};
use crate::node::{Change, ChangeKind, Interceptor, Turn};
use crate::{Result, WriteObserver};

type Copied<T> = std::result::Result<T, Failed>;

/// What the job and the guest's writes have in common.
pub(super) struct Tracker {
    copier: Copier,
    chunks: Chunks,
    control: OnceLock<Control>,
    /// Whether the mode `write-blocking` was asked for.
    blocking: AtomicBool,
    /// Why a write of the guest did not get to the target.
    failed: Mutex<Option<Failed>>,
    has_failed: AtomicBool,
}

impl Tracker {
    pub(super) fn new(copier: Copier, chunks: Chunks, blocking: bool) -> Self {
        Self {
            copier,
            chunks,
            control: OnceLock::new(),
            blocking: AtomicBool::new(blocking),
            failed: Mutex::default(),
            has_failed: AtomicBool::new(false),
        }
    }

    pub(super) fn copier(&self) -> &Copier {
        &self.copier
    }

    pub(super) fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// Who waits for something to copy from now on.
    pub(super) fn report_to(&self, control: &Control) {
        let _ = self.control.set(control.clone());
    }

    fn wake(&self) {
        if let Some(control) = self.control.get() {
            control.wake();
        }
    }

    pub(super) fn wants_blocking(&self) -> bool {
        self.blocking.load(Ordering::Acquire)
    }

    /// Asks for the mode `write-blocking`.
    pub(super) fn set_blocking(&self) {
        self.blocking.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    /// Why a write did not get to the target, once.
    pub(super) fn take_failed(&self) -> Option<Failed> {
        if !self.has_failed.swap(false, Ordering::AcqRel) {
            return None;
        }
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The next piece of at most `max` bytes of data for the job, which has it in hand then.
    pub(super) fn next_piece(&self, way: Way) -> Copied<Option<(Range<u64>, Kind)>> {
        let Some(claimed) = self.chunks.claim(LOOK) else { return Ok(None) };
        let look = self.copier.look(&claimed, self.chunks.unit(), way);
        let (mut part, kind) = look.inspect_err(|_| self.chunks.finish(&claimed, false))?;
        if kind == Kind::Data {
            part.end = part.end.min(part.start + self.copier.piece);
        }
        if part.end < claimed.end {
            self.chunks.finish(&(part.end..claimed.end), false);
        }
        Ok(Some((part, kind)))
    }

    /// Copies a piece that is in hand, and lets go of it.
    pub(super) fn do_piece(&self, range: &Range<u64>, kind: Kind, way: Way) -> Copied<()> {
        let result = self.copier.copy(range, kind, way);
        self.chunks.finish(range, result.is_ok());
        if result.is_ok()
            && let Some(control) = self.control.get()
        {
            control.advance(range.end - range.start);
        }
        result
    }

    /// Makes a change on the target that was made on the source, which touches these chunks.
    fn follow(&self, change: &Change<'_>, chunks: &Range<u64>) -> Copied<bool> {
        let copier = &self.copier;
        let end = chunks.end.min(copier.source.size());
        let all = change.offset == chunks.start && change.end() == end;
        if !all && !matches!(change.kind, ChangeKind::Discard) && copier.takes_whole_chunks() {
            copier.copy(&(chunks.start..end), Kind::Data, Way::Through)?;
            return Ok(true);
        }
        let result = match change.kind {
            ChangeKind::Write(bufs) | ChangeKind::Compressed(bufs) => {
                copier.target.write(change.offset, bufs)
            }
            ChangeKind::Zeroes { unmap } => {
                copier.records_zeroes();
                copier.target.write_zeroes(change.offset, change.len, unmap && copier.unmap)
            }
            // What it reads as afterwards only the source tells.
            ChangeKind::Discard => return Ok(false),
        };
        result.map_err(|error| Failed { side: Side::Target, error })?;
        Ok(true)
    }
}

impl WriteObserver for Tracker {
    fn wrote(&self, offset: u64, len: u64) {
        if self.chunks.mark_unseized(offset..offset.saturating_add(len)) {
            self.wake();
        }
    }
}

impl Interceptor for Tracker {
    fn before(&self, change: &Change<'_>) -> Result<Option<Box<dyn Turn + '_>>> {
        let seized = self.chunks.seize(&(change.offset..change.end()));
        Ok(Some(Box::new(BothSides { tracker: self, seized })))
    }

    fn uses_data(&self) -> bool {
        true
    }
}

/// A change of the source that is to be made on the target, too.
struct BothSides<'a> {
    tracker: &'a Tracker,
    /// The parts it touches.
    seized: Range<u64>,
}

impl Turn for BothSides<'_> {
    fn after(self: Box<Self>, change: &Change<'_>, result: &Result<()>) {
        let Self { tracker, seized } = *self;
        // One that failed may have been made in part.
        let done = result.is_ok()
            && tracker.follow(change, &seized).unwrap_or_else(|failed| {
                let mut place = tracker.failed.lock().unwrap_or_else(PoisonError::into_inner);
                place.get_or_insert(failed);
                tracker.has_failed.store(true, Ordering::Release);
                false
            });
        tracker.chunks.release(&seized, &(change.offset..change.end()), done);
        if tracker.has_failed() || tracker.chunks.any() {
            tracker.wake();
        }
    }
}
