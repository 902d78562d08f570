//! blockdev-backup: the contents of a node at one moment, copied while they change.
//!
//! ```text
//!   new (requests held: the moment)      run                                  commit
//!     all parts are to do ──────────────> copied by the job ───────────────> done
//!                          └── a guest's write comes first: its parts are copied,
//!                              and only then written ───────────────────────^
//! ```
//!
//! **Order.** A part of the source that is to do is as it was at the moment: whoever is to change it
//! copies it first, and the change is made once the copy is in the target. A part that is being copied
//! is at work; changes of it wait. So nobody reads a part while it changes, and each is copied once.
//!
//! The copy is made durable before the job succeeds. A bitmap takes effect in `commit` alone: it has
//! what it had until then, so after a crash or an abort the next backup copies more, never less.

mod before;
mod options;

use std::sync::{Arc, Mutex};

pub use options::{BackupOptions, BitmapMode, OnCbwError, SyncMode};

use before::BeforeWrite;

use super::chunks::Chunks;
use super::copy::{Copier, Failed, Kind, LOOK, PIECE, Way};
use super::crew::{Copiers, Turn, with_crew};
use super::{Control, Operation, Side};
use crate::bitmap::{Bitmap, BitmapHold};
use crate::graph::{Attachment, Claim, Graph, Intercepting, User, not_found};
use crate::node::Occupied;
use crate::perm::Perm;
use crate::{Error, Node, Result};

/// Smallest part that is copied as a whole, in bytes; QEMU's BLOCK_COPY_CLUSTER_SIZE_DEFAULT.
const MIN_UNIT: u64 = 64 << 10;

/// A backup. Its moment is that of [`Backup::new`].
pub struct Backup {
    options: BackupOptions,
    copy: Arc<BeforeWrite>,
    bitmap: Option<(BitmapHold, BitmapMode)>,
    /// Dropped first: no write waits for the target any more once that is let go.
    intercepting: Option<Intercepting>,
    _claim: Claim,
    _occupied: Occupied,
    _attached: [Attachment; 2],
}

/// Checks that nobody else holds what the backup needs.
fn check_free(
    graph: &Graph,
    options: &BackupOptions,
    (source, target): (&Arc<Node>, &Arc<Node>),
    bitmap: Option<&Bitmap>,
) -> Result<()> {
    if Arc::ptr_eq(source, target) {
        return Err(Error::Invalid("Source and target cannot be the same".to_owned()));
    }
    graph.check_unclaimed(&options.source)?;
    target.check_no_job()?;
    if options.compress && target.format().compressed_cluster().is_none() {
        return Err(Error::Invalid("Compression is not supported for this drive ".to_owned()));
    }
    if let Some(bitmap) = bitmap {
        bitmap.check_usable()?;
    }
    graph.check_no_format_above(&options.source)?;
    graph.check_no_format_above(&options.target)
}

/// Marks what the job is to copy: what the bitmap says, or all. From now on the bitmap notes writes apart.
fn mark_to_do(chunks: &Chunks, size: u64, sync: SyncMode, bitmap: Option<&BitmapHold>) {
    match bitmap {
        Some(hold) if matches!(sync, SyncMode::Incremental | SyncMode::Bitmap) => {
            for range in hold.bitmap().dirty_ranges() {
                chunks.mark(range);
            }
        }
        _ => {
            chunks.mark(0..size);
        }
    }
    if let Some(hold) = bitmap {
        hold.bitmap().begin_since();
    }
}

impl Backup {
    /// Checks, and takes note of the contents as they are now. Requests to the source wait meanwhile,
    /// which those in flight take; they may be held already ([`Graph::hold`], which must have been asked
    /// for the source).
    ///
    /// # Errors
    /// With QEMU's texts. Nothing is changed then.
    pub fn new(graph: &Graph, options: BackupOptions) -> Result<Self> {
        let find = |name: &str| graph.get(name).ok_or_else(|| not_found(name));
        let (source, target) = (find(&options.source)?, find(&options.target)?);
        let bitmap = options.bitmap_of(&source)?;
        check_free(
            graph,
            &options,
            (&source, &target),
            bitmap.as_ref().map(|(bitmap, _)| &**bitmap),
        )?;
        let claim = graph.claim(&[&options.target], "backup")?;
        let occupied = source.occupy("backup")?;
        // Writes of the guest may go to the target's backing file, so they are let; another size is not.
        let shared = Perm::all() - Perm::RESIZE;
        // QEMU uses the target through a filter, which it cannot make then.
        let unusable = |error| Error::Invalid(format!("Could not create node: {error}"));
        let attached = [
            graph.attach(&options.source, User::unnamed(Perm::CONSISTENT_READ, shared))?,
            graph.attach(&options.target, User::unnamed(Perm::WRITE, shared)).map_err(unusable)?,
        ];
        let size = source.size();
        if size != target.size() {
            return Err(Error::Invalid("Source and target image have different sizes".to_owned()));
        }
        let unit = target.copy_unit().max(MIN_UNIT);
        let copier = Copier {
            source: source.clone(),
            target: target.clone(),
            top_only: options.sync == SyncMode::Top,
            whole: options.sync.is_whole(&source),
            compress: options.compress,
            unmap: true,
            piece: PIECE.max(unit),
            spare: Mutex::default(),
        };
        let copy = BeforeWrite::new(copier, Chunks::new(size, unit), options.on_cbw_error);
        let copy = Arc::new(copy);
        let held = graph.hold(&[&options.source])?;
        let bitmap = match bitmap {
            Some((bitmap, mode)) => Some((bitmap.hold()?, mode)),
            None => None,
        };
        mark_to_do(copy.chunks(), size, options.sync, bitmap.as_ref().map(|(hold, _)| hold));
        let intercepting = Some(graph.intercept(&held, &source, &target, copy.clone()));
        drop(held);
        Ok(Self {
            options,
            copy,
            bitmap,
            intercepting,
            _claim: claim,
            _occupied: occupied,
            _attached: attached,
        })
    }

    /// The target.
    fn target(&self) -> &Node {
        &self.copy.copier().target
    }

    /// Ends the copying before writes; those under way are waited for.
    fn disarm(&mut self) {
        self.intercepting = None;
    }

    /// Leaves out what the source's own image does not have, so that the sum is known before the work.
    fn leave_out(&self, control: &Control) -> Result<()> {
        let chunks = self.copy.chunks();
        for whole in chunks.left() {
            let mut at = whole.start;
            while at < whole.end {
                control.rest()?;
                // A part is claimed while it is looked at: nobody changes it in between.
                let within = at..whole.end.min(at + LOOK);
                let Some(claimed) = chunks.claim_within(&within, LOOK) else {
                    at = within.end;
                    continue;
                };
                match self.copy.copier().look(&claimed, chunks.unit(), Way::Through) {
                    Ok((part, kind)) => {
                        chunks.finish(&claimed, false);
                        if kind == Kind::Skip {
                            self.copy.skip(&part);
                        }
                        at = part.end;
                    }
                    Err(failed) => {
                        chunks.finish(&claimed, false);
                        self.failed(control, failed)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn failed(&self, control: &Control, failed: Failed) -> Result<()> {
        let policy = match failed.side {
            Side::Source => self.options.on_source_error,
            Side::Target => self.options.on_target_error,
        };
        control.failed(policy, failed.side, failed.error)
    }

    /// Copies all that is to do, a few pieces at once.
    fn copy_all(&self, control: &Control) -> Result<()> {
        let work = |(range, kind)| self.copy.do_piece(&range, kind);
        with_crew(&work, |crew| {
            let result = self.hand_out(control, crew);
            // Also after an error: no piece is under way when this returns.
            while crew.next().is_some() {}
            result
        })
    }

    fn hand_out(&self, control: &Control, crew: &mut Copiers<'_>) -> Result<()> {
        loop {
            self.copy.check()?;
            match crew.hand_out(control, || self.copy.next_piece()) {
                Turn::Next => {}
                Turn::Nothing if self.copy.wait_for_others() => return self.copy.check(),
                Turn::Nothing => {}
                Turn::Rest(wrong) => crew.rest(control, wrong, |f| self.failed(control, f))?,
            }
        }
    }

    /// What becomes of the bitmap. On an error it has all that it had.
    fn settle_bitmap(&mut self, success: bool) -> Result<()> {
        let Some((hold, mode)) = self.bitmap.take() else { return Ok(()) };
        let bitmap = hold.bitmap();
        let left = match (mode, success) {
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => Vec::new(),
            (BitmapMode::Always, false) => self.copy.chunks().left(),
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => {
                bitmap.end_since(None);
                return Ok(());
            }
        };
        let marked = self.copy.copier().source.bitmap_changes(bitmap);
        bitmap.end_since(marked.is_ok().then_some(&left));
        marked
    }
}

impl Operation for Backup {
    fn run(&mut self, control: &Control) -> Result<()> {
        if self.options.sync == SyncMode::Top {
            self.leave_out(control)?;
        }
        self.copy.report_to(control);
        if self.options.sync == SyncMode::None {
            // Only writes are copied, until somebody ends the job.
            return control.idle(|| self.copy.broken()).and_then(|_| self.copy.check());
        }
        self.copy_all(control)?;
        control.caught_up();
        // What is written from now on concerns it no more.
        self.disarm();
        loop {
            match self.target().flush() {
                Ok(()) => return Ok(()),
                Err(error) => self.failed(control, Failed { side: Side::Target, error })?,
            }
        }
    }

    fn commit(&mut self) -> Result<()> {
        self.disarm();
        self.settle_bitmap(true)
    }

    fn abort(&mut self) {
        self.disarm();
        if let Err(error) = self.settle_bitmap(false) {
            let node = self.copy.copier().source.name();
            tracing::warn!(node, "the bitmap stays as it was before the backup: {error}");
        }
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.abort();
    }
}
