//! blockdev-mirror: a node that is kept the same as another, until it takes its place or is let go.
//!
//! ```text
//!   new: changes are tracked ──> run: copy what is marked ──> ready ──> complete or leave asked for
//!                                       ^        │ nothing left            │
//!                                       └── marked by writes               v
//!                                               write-blocking, copy what is left ──> commit
//!   commit: requests held ──> the rest copied ──> target durable ──> the target takes the place ──> let go
//! ```
//!
//! **Order.** A part is unmarked before it is read and marked again if it changes meanwhile, so what is
//! not marked, nor at work, is the same on both sides. `commit` holds requests: nothing is marked any
//! more then, and the two are the same when the last part is copied. The target is durable before it
//! takes the place, so nothing that the guest was told is durable is lost with the source.
//!
//! Writes may come faster than they can be copied. Once the end is asked for they go to both sides
//! before they complete, so what is left only shrinks, and the guest is held for little.
//!
//! Up to the change of the graph, which is all or nothing, a failure leaves the source in its place.

mod options;
mod tracker;

use std::ops::Range;
use std::sync::{Arc, Mutex};

pub use options::{CopyMode, MirrorOptions};

use tracker::Tracker;

use super::chunks::Chunks;
use super::copy::{Copier, Failed, Kind, LOOK, PIECE, Way};
use super::crew::{Copiers, PARALLEL, Turn, with_crew};
use super::{Control, Finish, Operation, Side, SyncMode, Wake};
use crate::graph::{Attachment, Claim, Graph, Intercepting, User, not_found};
use crate::perm::{Perm, Permissions};
use crate::{Error, Preallocation, Progress, Result, WriteObserver};

/// Once all was copied, no more than this being left counts as ready, in bytes: a guest that always
/// writes would hardly ever let there be nothing.
const NEARLY: u64 = 1 << 20;

/// A mirror. Changes are tracked from [`Mirror::new`] on.
pub struct Mirror {
    graph: Graph,
    options: MirrorOptions,
    tracker: Arc<Tracker>,
    intercepting: Option<Intercepting>,
    finish: Option<Finish>,
    attached: Option<[Attachment; 2]>,
    /// What the target is used for until the end.
    writing: Permissions,
    /// How many images, from the source down, the data is taken from; for a commit only.
    images: Option<u32>,
    claim: Option<Claim>,
}

/// A mirror into an image below the source: how a commit uses both.
pub(super) struct Below {
    /// Of the source and the target, in this order.
    pub(super) attached: [Attachment; 2],
    /// What the target is used for.
    pub(super) writing: Permissions,
    pub(super) claim: Claim,
    /// How many images there are above the target.
    pub(super) images: u32,
}

/// A mirror as those see it who watch it.
#[derive(Clone)]
pub struct MirrorHandle(Arc<Tracker>);

impl MirrorHandle {
    /// Has writes go to both sides before they complete, from soon on: block-job-change. There is no
    /// way back, as in QEMU.
    pub fn set_write_blocking(&self) {
        self.0.set_blocking();
    }

    /// Whether writes go to both sides and these are the same: QMP's `actively-synced`.
    pub fn actively_synced(&self) -> bool {
        self.0.wants_blocking() && self.0.chunks().is_clean()
    }
}

impl Mirror {
    /// Checks, and tracks changes from now on.
    ///
    /// # Errors
    /// With QEMU's texts. Nothing is changed then.
    pub fn new(graph: &Graph, options: MirrorOptions) -> Result<Self> {
        let find = |name: &str| graph.get(name).ok_or_else(|| not_found(name));
        let source = find(&options.source)?;
        graph.check_root(&options.source)?;
        let target = find(&options.target)?;
        options.check_granularity()?;
        target.check_no_job()?;
        // What is over it would read something else from the first write on.
        graph.check_no_overlay(&options.target)?;
        options.check_replaces(graph, &source)?;
        options.check_way()?;
        if Arc::ptr_eq(&source, &target) {
            return Err(Error::Invalid("Can't mirror node into itself".to_owned()));
        }
        graph.check_no_format_above(&options.target)?;
        let claim = graph.claim(&[&options.source, &options.target], "mirror")?;
        // The target is not what it is to be before the end: nobody else uses it.
        let (read, write) = (Perm::CONSISTENT_READ, Perm::WRITE);
        let writing = Permissions { used: write, shared: Perm::WRITE_UNCHANGED };
        let to = User::unnamed(writing.used, writing.shared);
        let attached = [
            graph.attach(&options.source, User::unnamed(read, Perm::all() - Perm::RESIZE))?,
            graph.attach(&options.target, to)?,
        ];
        Self::track(graph, options, attached, writing, claim, None)
    }

    /// As [`Mirror::new`] into an image below the source, which was checked and attached.
    pub(super) fn into_below(graph: &Graph, options: MirrorOptions, below: Below) -> Result<Self> {
        let Below { attached, writing, claim, images } = below;
        Self::track(graph, options, attached, writing, claim, Some(images))
    }

    fn track(
        graph: &Graph,
        options: MirrorOptions,
        attached: [Attachment; 2],
        writing: Permissions,
        claim: Claim,
        images: Option<u32>,
    ) -> Result<Self> {
        let (source, target) = (attached[0].node(), attached[1].node());
        let unit = options.unit(&target);
        let most = (options.buf_size() / PARALLEL as u64).min(PIECE);
        let copier = Copier {
            source: source.clone(),
            target,
            top_only: false,
            // What a commit goes into has all that is below it.
            whole: options.sync.is_whole(&source) || images.is_some(),
            compress: false,
            unmap: options.unmap,
            piece: (most - most % unit).max(unit),
            spare: Mutex::default(),
        };
        let blocking = options.copy_mode == CopyMode::WriteBlocking;
        let chunks = Chunks::new(source.size(), unit);
        let tracker = Arc::new(Tracker::new(copier, chunks, blocking));
        let mut mirror = Self {
            graph: graph.clone(),
            options,
            tracker: tracker.clone(),
            intercepting: None,
            finish: None,
            attached: Some(attached),
            writing,
            images,
            claim: Some(claim),
        };
        // From before the first look at the source, so that nothing is missed.
        source.observe(tracker);
        mirror.heed_mode()?;
        Ok(mirror)
    }

    /// For those who watch.
    pub fn handle(&self) -> MirrorHandle {
        MirrorHandle(self.tracker.clone())
    }

    /// Gives a target that is smaller the source's size.
    pub(super) fn grow_target(&self) -> Result<()> {
        let Copier { source, target, .. } = self.tracker.copier();
        if target.size() < source.size() {
            target.resize(source.size(), Preallocation::Off, &Progress::default())?;
        }
        Ok(())
    }

    /// Whether the target was to take the source's place.
    pub(super) fn completes(&self) -> bool {
        self.finish == Some(Finish::Complete)
    }

    /// Gives up both nodes, after the end.
    pub(super) fn release(&mut self) {
        if let Some([source, target]) = self.attached.take() {
            // In this order: in a commit the target can be written only because of the other use.
            drop(target);
            drop(source);
        }
        self.claim = None;
    }

    fn chunks(&self) -> &Chunks {
        self.tracker.chunks()
    }

    /// Has writes go to both sides, if that is asked for and not so yet.
    fn heed_mode(&mut self) -> Result<()> {
        if self.intercepting.is_some() || !self.tracker.wants_blocking() {
            return Ok(());
        }
        let held = self.graph.hold(&[&self.options.source])?;
        let (source, target) = (&self.tracker.copier().source, &self.tracker.copier().target);
        let intercepting = self.graph.intercept(&held, source, target, self.tracker.clone());
        self.intercepting = Some(intercepting);
        Ok(())
    }

    /// Ends the tracking.
    fn let_go(&mut self) {
        self.intercepting = None;
        let observer: Arc<dyn WriteObserver> = self.tracker.clone();
        self.tracker.copier().source.unobserve(&observer);
    }

    /// Marks what is to be copied of what there is.
    fn mark(&self, control: &Control) -> Result<()> {
        let size = self.tracker.copier().source.size();
        match self.options.sync {
            SyncMode::Top => {
                let mut at = 0;
                while at < size {
                    control.rest()?;
                    at = self.mark_own(at, size, control)?;
                }
            }
            SyncMode::Full => {
                self.chunks().mark(0..size);
            }
            SyncMode::None | SyncMode::Incremental | SyncMode::Bitmap => {}
        }
        Ok(())
    }

    /// Marks what the source's own image has of a part from `at` on; gives the part's end.
    fn mark_own(&self, at: u64, size: u64, control: &Control) -> Result<u64> {
        let len = LOOK.min(size - at);
        let list = self.tracker.copier().source.access().block_status(at, len);
        let list = match list {
            Ok(list) => list,
            Err(error) => {
                self.failed(control, Failed { side: Side::Source, error })?;
                return Ok(at);
            }
        };
        let mut end = at;
        for extent in list {
            if (1..=self.images.unwrap_or(1)).contains(&extent.depth) {
                self.chunks().mark(end..end + extent.len);
            }
            end += extent.len;
        }
        Ok(end)
    }

    fn failed(&self, control: &Control, failed: Failed) -> Result<()> {
        let policy = match failed.side {
            Side::Source => self.options.on_source_error,
            Side::Target => self.options.on_target_error,
        };
        control.failed(policy, failed.side, failed.error)
    }

    /// Copies what is marked, now and later, until the end is asked for and nothing is left.
    fn keep_same(&mut self, control: &Control, crew: &mut Copiers<'_>) -> Result<Finish> {
        let first = self.chunks().remaining();
        loop {
            if control.finish().is_some() {
                self.tracker.set_blocking();
            }
            self.heed_mode()?;
            self.tell_progress(control, first);
            let turn = match self.tracker.take_failed() {
                Some(failed) => Turn::Rest(Some(failed)),
                None => crew.hand_out(control, || self.tracker.next_piece(Way::Through)),
            };
            match turn {
                Turn::Next => {}
                Turn::Nothing => {
                    if let Some(finish) = self.rest_when_same(control)? {
                        return Ok(finish);
                    }
                }
                Turn::Rest(wrong) => crew.rest(control, wrong, |f| self.failed(control, f))?,
            }
        }
    }

    /// Nothing is left to copy: waits for more, or gives how it is to end.
    fn rest_when_same(&self, control: &Control) -> Result<Option<Finish>> {
        if self.chunks().any() {
            // All of it is touched by writes that go to both sides.
            self.chunks().wait_for_free();
            return Ok(None);
        }
        control.caught_up();
        control.ready();
        match control.finish() {
            // Since writes go to both sides, all that was marked before has been copied.
            Some(finish) if self.intercepting.is_some() => return Ok(Some(finish)),
            Some(_) => return Ok(None),
            None => {}
        }
        let work = || {
            self.chunks().any()
                || self.tracker.has_failed()
                || (self.tracker.wants_blocking() && self.intercepting.is_none())
        };
        match control.idle(work)? {
            Wake::Work | Wake::Finish(_) => Ok(None),
        }
    }

    /// What is left is never less than what is told; ready is told once little is left.
    fn tell_progress(&self, control: &Control, first: u64) {
        let left = self.chunks().remaining();
        if !control.is_ready() && left <= NEARLY && control.progress().0 >= first {
            control.caught_up();
            control.ready();
        }
        control.set_remaining(left);
    }

    /// Copies what is left, with requests to the source held.
    fn copy_rest(&self) -> Result<()> {
        let tracker = &self.tracker;
        while let Some((range, kind)) = tracker.next_piece(Way::Held).map_err(|f| f.error)? {
            tracker.do_piece(&range, kind, Way::Held).map_err(|f| f.error)?;
        }
        tracker.copier().target.format().flush()
    }

    /// The target takes the place of the source, or of what is to be replaced.
    fn pivot(&mut self) -> Result<()> {
        let replaced = self.options.replaces.as_ref().unwrap_or(&self.options.source).clone();
        let Some([_, target]) = &self.attached else { return Ok(()) };
        // What a guest lets others do, so that it can come.
        let reading = Permissions { used: Perm::CONSISTENT_READ, shared: Perm::all() };
        target.set_permissions(reading)?;
        match self.graph.replace(&replaced, &self.options.target) {
            Ok(()) => {
                self.attached = None;
                Ok(())
            }
            Err(error) => {
                if let Err(e) = target.set_permissions(self.writing) {
                    tracing::debug!("the target's use could not be taken up again: {e}");
                }
                Err(error)
            }
        }
    }
}

impl Operation for Mirror {
    fn run(&mut self, control: &Control) -> Result<()> {
        let Copier { source, target, .. } = self.tracker.copier();
        if self.images.is_none() && source.size() != target.size() {
            return Err(Error::Invalid("Source and target image have different sizes".to_owned()));
        }
        self.tracker.report_to(control);
        self.mark(control)?;
        let tracker = self.tracker.clone();
        let work = |(range, kind): (Range<u64>, Kind)| tracker.do_piece(&range, kind, Way::Through);
        let finish = with_crew(&work, |crew| {
            let result = self.keep_same(control, crew);
            while crew.next().is_some() {}
            result
        })?;
        self.finish = Some(finish);
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        let held = self.graph.hold(&[&self.options.source])?;
        self.copy_rest()?;
        if self.finish == Some(Finish::Complete) {
            self.pivot()?;
        }
        // Before requests go on: they are nobody's but the guest's from then on.
        self.let_go();
        drop(held);
        Ok(())
    }

    fn abort(&mut self) {
        self.let_go();
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.abort();
    }
}
