//! The copying of a backup, by its job and by writes that come first.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::OnCbwError;
use crate::jobs::Control;
use crate::jobs::chunks::Chunks;
use crate::jobs::copy::{Copier, Failed, Kind, LOOK, Way};
use crate::node::{Change, Interceptor, Turn};
use crate::{Error, Result};

type Copied<T> = std::result::Result<T, Failed>;

/// What the job and the guest's writes have in common.
pub(super) struct BeforeWrite {
    copier: Copier,
    chunks: Chunks,
    on_error: OnCbwError,
    /// Who is told of progress, once the job runs.
    control: OnceLock<Control>,
    /// Bytes copied before that.
    early: Mutex<u64>,
    /// Why the copy is not that of the moment, where guests' writes went on without it.
    broken: Mutex<Option<Error>>,
    is_broken: AtomicBool,
}

impl BeforeWrite {
    pub(super) fn new(copier: Copier, chunks: Chunks, on_error: OnCbwError) -> Self {
        Self {
            copier,
            chunks,
            on_error,
            control: OnceLock::new(),
            early: Mutex::default(),
            broken: Mutex::default(),
            is_broken: AtomicBool::new(false),
        }
    }

    pub(super) fn copier(&self) -> &Copier {
        &self.copier
    }

    pub(super) fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// Tells progress to `control` from now on, what there was first.
    pub(super) fn report_to(&self, control: &Control) {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        control.add_total(*early + self.chunks.remaining());
        control.advance(std::mem::take(&mut *early));
        // With the lock, so that what ends meanwhile is counted in one place.
        let _ = self.control.set(control.clone());
    }

    fn advance(&self, bytes: u64) {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        match self.control.get() {
            Some(control) => control.advance(bytes),
            None => *early += bytes,
        }
    }

    /// Leaves a range out that nothing was done to yet.
    pub(super) fn skip(&self, range: &Range<u64>) {
        self.chunks.unmark(range);
    }

    /// The next piece for the job, which has it in hand then.
    pub(super) fn next_piece(&self) -> Copied<Option<(Range<u64>, Kind)>> {
        match self.chunks.claim(LOOK) {
            Some(claimed) => self.cut(claimed).map(Some),
            None => Ok(None),
        }
    }

    /// What is to be done with the first part of a range that was claimed; the rest is let go.
    fn cut(&self, claimed: Range<u64>) -> Copied<(Range<u64>, Kind)> {
        let look = self.copier.look(&claimed, self.chunks.unit(), Way::Through);
        let (mut part, kind) = look.inspect_err(|_| self.chunks.finish(&claimed, false))?;
        if kind == Kind::Data {
            part.end = part.end.min(part.start + self.copier.piece);
        }
        if part.end < claimed.end {
            self.chunks.finish(&(part.end..claimed.end), false);
        }
        Ok((part, kind))
    }

    /// Copies a piece that is in hand, and lets go of it.
    pub(super) fn do_piece(&self, range: &Range<u64>, kind: Kind) -> Copied<()> {
        let result = self.copier.copy(range, kind, Way::Through);
        if result.is_ok() {
            self.advance(range.end - range.start);
        }
        self.chunks.finish(range, result.is_ok());
        result
    }

    /// After the last piece: waits for what guests' writes copy; false if some of it is to do again.
    pub(super) fn wait_for_others(&self) -> bool {
        match self.chunks.claim_within(&(0..u64::MAX), 1) {
            None => true,
            Some(claimed) => {
                self.chunks.finish(&claimed, false);
                false
            }
        }
    }

    /// Copies what a change would overwrite.
    fn save(&self, range: &Range<u64>) -> Copied<()> {
        while let Some(claimed) = self.chunks.claim_within(range, self.copier.piece) {
            let (piece, kind) = self.cut(claimed)?;
            self.do_piece(&piece, kind)?;
        }
        Ok(())
    }

    /// Whether a write went on without its old contents being saved.
    pub(super) fn broken(&self) -> bool {
        self.is_broken.load(Ordering::Acquire)
    }

    /// Why that was so, once.
    pub(super) fn check(&self) -> Result<()> {
        if !self.broken() {
            return Ok(());
        }
        let error = self.broken.lock().unwrap_or_else(PoisonError::into_inner).take();
        Err(error.unwrap_or(Error::Cancelled))
    }

    fn break_copy(&self, error: Error) {
        tracing::warn!(
            node = self.copier.source.name(),
            "a backup fails, its old contents could not be saved before a write: {error}"
        );
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.is_broken.store(true, Ordering::Release);
        if let Some(control) = self.control.get() {
            control.wake();
        }
    }
}

impl Interceptor for BeforeWrite {
    fn before(&self, change: &Change<'_>) -> Result<Option<Box<dyn Turn + '_>>> {
        if self.broken() {
            return Ok(None);
        }
        match (self.save(&(change.offset..change.end())), self.on_error) {
            (Ok(()), _) => Ok(None),
            (Err(failed), OnCbwError::BreakGuestWrite) => Err(failed.error),
            (Err(failed), OnCbwError::BreakSnapshot) => {
                self.break_copy(failed.error);
                Ok(None)
            }
        }
    }
}
