//! Named images.

use std::fmt::{self, Debug, Formatter};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::bitmap::BitmapSet;
use crate::format::Format;
use crate::graph::{DetectZeroes, Flags, NodeOptions};
use crate::iobuf;
use crate::qcow2::Qcow2;
use crate::stack::deep;
use crate::storage::{FileStorage, Storage};
use crate::{Preallocation, Progress, ReadBuf, Result, SnapshotInfo, WriteBuf};

mod access;
mod gate;
mod intercept;
mod jobs;
mod link;

pub use access::Access;
use gate::Gate;
pub(crate) use gate::{Closed, Holding};
use intercept::Interception;
pub use intercept::{Change, ChangeKind, Interceptor, Turn};
pub use jobs::{Occupied, Saving};
pub use link::{Entered, Link};

/// An image with a name: QEMU's block node. Devices, checkpoints and exports all go through it.
///
/// Requests go through the node's methods, or through an [`Access`]: so they are seen by those who
/// watch writes, and are held back while the image below is replaced (blockdev-reopen).
pub struct Node {
    name: String,
    gate: Arc<Gate>,
    live: RwLock<Live>,
    observers: RwLock<Vec<Arc<dyn WriteObserver>>>,
    /// Their number: looked at by every write, nearly always 0.
    observed: AtomicUsize,
    interception: Interception,
    jobs: jobs::Jobs,
}

/// What a reopen replaces.
#[derive(Clone)]
struct Live {
    format: Arc<dyn Format>,
    details: Arc<Details>,
}

/// What the graph knows of a node beyond its format.
#[derive(Clone, Default)]
pub(crate) struct Details {
    pub(crate) filename: String,
    pub(crate) storage: Option<Arc<dyn Storage>>,
    /// The file, where the node is the file's own.
    pub(crate) host: Option<Arc<FileStorage>>,
    pub(crate) qcow2: Option<Arc<Qcow2>>,
    /// The protocol node below.
    pub(crate) file: Option<Arc<Node>>,
    /// The external data file of a qcow2 image.
    pub(crate) data_file: Option<Arc<Node>>,
    /// The image below.
    pub(crate) backing: Option<Arc<Node>>,
    /// The backing file's name with its directory, if the image names one.
    pub(crate) full_backing: Option<String>,
    pub(crate) flags: Flags,
    /// What the user said; none for a node outside a graph.
    pub(crate) options: Option<NodeOptions>,
    /// Name of the node whose options had those of this one in them.
    pub(crate) inherits_from: Option<String>,
    /// Made together with another node, and goes with it.
    pub(crate) implicit: bool,
    /// The image's bitmaps where it stores them, with those in memory only.
    pub(crate) bitmaps: Arc<BitmapSet>,
}

/// Is told of every change of a node's contents.
pub trait WriteObserver: Send + Sync {
    /// The guest range was written, zeroed or discarded, or that failed halfway. Comes before the
    /// request completes, from the thread that carries it out; must not wait for I/O.
    fn wrote(&self, offset: u64, len: u64);
}

impl Node {
    /// Names an open image.
    pub fn new(name: impl Into<String>, format: Arc<dyn Format>) -> Self {
        Self::with_details(name.into(), format, Details::default())
    }

    /// Names an open qcow2 image, outside a graph; its bitmaps are the node's.
    pub fn of_qcow2(name: impl Into<String>, image: Arc<Qcow2>) -> Self {
        let bitmaps = image.bitmaps().clone();
        let details = Details { qcow2: Some(image.clone()), bitmaps, ..Details::default() };
        Self::with_details(name.into(), image, details)
    }

    pub(crate) fn with_details(name: String, format: Arc<dyn Format>, details: Details) -> Self {
        Self {
            name,
            gate: Arc::default(),
            live: RwLock::new(Live { format, details: Arc::new(details) }),
            observers: RwLock::default(),
            observed: AtomicUsize::new(0),
            interception: Interception::default(),
            jobs: jobs::Jobs::default(),
        }
    }

    /// The node's name, unique in its graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image as it is now, for its snapshots and what it can do. Requests go through
    /// [`Node::access`] or the methods below, which a reopen waits for.
    pub fn format(&self) -> Arc<dyn Format> {
        self.live().format
    }

    /// The right to carry out a request; waits while the image is being replaced. A thread that
    /// has to complete other requests of its own meanwhile calls [`Node::try_access`] instead.
    pub fn access(&self) -> Access {
        let passage = self.gate.enter();
        Access::new(self.format(), passage)
    }

    /// As [`Node::access`]; `None` while the image is being replaced.
    pub fn try_access(&self) -> Option<Access> {
        let passage = self.gate.try_enter()?;
        Some(Access::new(self.format(), passage))
    }

    /// Size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.look(|format| format.size())
    }

    /// The driver's QMP name: "qcow2", "raw", "file".
    pub fn driver(&self) -> &'static str {
        self.look(|format| format.driver())
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let flags = &live.details.flags;
        if flags.inactive { flags.read_only } else { live.format.read_only() }
    }

    /// Whether another process may have the image: [`Node::read_only`] tells what it will be, until then
    /// all writes are refused. See [`crate::Graph::inactivate`].
    pub fn is_inactive(&self) -> bool {
        self.live.read().unwrap_or_else(PoisonError::into_inner).details.flags.inactive
    }

    /// Whether the image takes no writes: [`Node::read_only`], or damage was found in it since it was
    /// opened.
    pub fn refuses_writes(&self) -> bool {
        let damaged = || self.qcow2().is_some_and(|image| image.refuses_writes());
        self.read_only() || (!self.is_inactive() && damaged())
    }

    /// Whether [`Node::write_zeroes`] is faster than writing zeroes.
    pub fn fast_zeroes(&self) -> bool {
        self.look(|format| format.fast_zeroes())
    }

    /// The internal snapshots in table order.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.look(|format| format.snapshots())
    }

    /// Reads `bufs` one after another from `offset`.
    ///
    /// # Errors
    /// As [`Format::read`].
    pub fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.access().read(offset, bufs)
    }

    /// Writes `bufs` one after another at `offset`. Durable only after [`Node::flush`].
    ///
    /// # Errors
    /// As [`Format::write`].
    pub fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.change(&Change::write(offset, bufs))
    }

    /// As [`Node::write`], compressed.
    ///
    /// # Errors
    /// As [`Format::write_compressed`].
    pub fn write_compressed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.change(&Change::compressed(offset, bufs))
    }

    fn change(&self, change: &Change<'_>) -> Result<()> {
        {
            let access = self.access();
            if !self.intercepts(change) {
                return self.make(&access, change);
            }
        }
        let made = |change: &Change<'_>| (self.make(&self.access(), change), ());
        self.interception.around(change, made).0
    }

    /// Whether a change has to go through interceptors; with an [`Access`]. Not one that the image
    /// refuses.
    fn intercepts(&self, change: &Change<'_>) -> bool {
        self.intercepted()
            && change.len > 0
            && self.look(|format| !format.read_only() && change.end() <= format.size())
    }

    /// Makes a change, after the interceptors.
    fn make(&self, access: &Access, change: &Change<'_>) -> Result<()> {
        let Change { offset, len, kind } = *change;
        let image = access.format();
        let result = match kind {
            ChangeKind::Write(bufs) => match self.zeroes_to_detect(bufs) {
                Some(unmap) => image.write_zeroes(offset, len, unmap),
                None => image.write(offset, bufs),
            },
            ChangeKind::Compressed(bufs) => image.write_compressed(offset, bufs),
            ChangeKind::Zeroes { unmap } => image.write_zeroes(offset, len, unmap),
            ChangeKind::Discard => image.discard(offset, len),
        };
        self.note_write(offset, len);
        result
    }

    /// Whether a write is to become one of zeroes (QEMU's `detect-zeroes`), and whether that may
    /// give space back. For those who carry out writes by an [`Access`] of their own.
    pub fn zeroes_to_detect(&self, bufs: &[WriteBuf<'_>]) -> Option<bool> {
        let unmap = match self.detect_zeroes() {
            DetectZeroes::Off => return None,
            DetectZeroes::On => false,
            DetectZeroes::Unmap => true,
        };
        iobuf::is_zero(bufs).then_some(unmap)
    }

    fn detect_zeroes(&self) -> DetectZeroes {
        self.live.read().unwrap_or_else(PoisonError::into_inner).details.flags.detect_zeroes
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// As [`Format::flush`].
    pub fn flush(&self) -> Result<()> {
        self.access().flush()
    }

    /// Gives the disk another size, with no request under way; its dirty bitmaps follow.
    ///
    /// # Errors
    /// As [`Format::resize`]; or somebody has a bitmap.
    pub fn resize(&self, size: u64, mode: Preallocation, progress: &Progress) -> Result<()> {
        let closed = self.close_gate();
        if self.intercepted() {
            // A change that no interceptor would see. The graph's permissions keep it from coming here.
            return self.check_no_job();
        }
        let (format, bitmaps) = (self.format(), self.bitmaps());
        if size != format.size() {
            bitmaps.check_resize(size)?;
        }
        let result = format.resize(size, mode, progress);
        // Also after an error: a format may have got halfway. Those with bitmaps of their own have
        // done it, in their order.
        bitmaps.resize(format.size());
        drop(closed);
        result
    }

    /// Tells that the range is not needed. It reads as zeroes afterwards or as before.
    ///
    /// # Errors
    /// As [`Format::discard`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.change(&Change::discard(offset, len))
    }

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    ///
    /// # Errors
    /// As [`Format::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(&Change::zeroes(offset, len, unmap))
    }

    /// Tells those who watch that a range was changed, or that an attempt failed: part of it may
    /// have been written then. To be called before the request's completion is told to anybody, and
    /// before its [`Access`] is dropped: the image's bitmaps are stored when the image is replaced.
    pub fn note_write(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.details().bitmaps.note(offset, len);
        if self.observed.load(Ordering::Acquire) == 0 {
            return;
        }
        let observers = self.observers.read().unwrap_or_else(PoisonError::into_inner);
        for observer in observers.iter() {
            observer.wrote(offset, len);
        }
    }

    /// Has every later change told to `observer`, until [`Node::unobserve`].
    pub fn observe(&self, observer: Arc<dyn WriteObserver>) {
        let mut observers = self.observers.write().unwrap_or_else(PoisonError::into_inner);
        observers.push(observer);
        self.observed.store(observers.len(), Ordering::Release);
    }

    /// Ends [`Node::observe`].
    pub fn unobserve(&self, observer: &Arc<dyn WriteObserver>) {
        let mut observers = self.observers.write().unwrap_or_else(PoisonError::into_inner);
        observers.retain(|other| !Arc::ptr_eq(other, observer));
        self.observed.store(observers.len(), Ordering::Release);
    }

    /// The file it is in, as QMP shows it; empty for a node outside a graph.
    pub fn filename(&self) -> String {
        self.details().filename.clone()
    }

    /// The image below this one.
    pub fn backing(&self) -> Option<Arc<Node>> {
        self.details().backing.clone()
    }

    /// The node that shows what this one does, where it is a filter.
    pub(crate) fn filtered(&self) -> Option<Arc<Node>> {
        let live = self.live();
        if live.format.driver() == "compress" { live.details.file.clone() } else { None }
    }

    /// Bytes that copies to the node are best made of: its clusters; 0 if it has none.
    pub(crate) fn copy_unit(&self) -> u64 {
        let live = self.live();
        let cluster = live.details.qcow2.as_ref().map(|image| image.info().cluster_size);
        cluster.or(live.format.compressed_cluster()).unwrap_or(0)
    }

    /// Asks the image without taking a handle, which would keep a reopen from replacing it.
    fn look<T>(&self, ask: impl FnOnce(&dyn Format) -> T) -> T {
        ask(&*self.live.read().unwrap_or_else(PoisonError::into_inner).format)
    }

    /// Holds requests back and waits until those in flight are over, for who changes nothing that
    /// another who does so must not change.
    pub(crate) fn hold_gate(&self) -> Holding {
        self.gate.hold()
    }

    /// Holds requests back and waits until those in flight are over, for the only one who changes the node.
    pub(crate) fn close_gate(&self) -> Closed {
        self.gate.close()
    }

    /// Puts another image in the place of the one there is. The gate must be closed.
    pub(crate) fn replace(&self, _closed: &Closed, format: Arc<dyn Format>, details: Details) {
        let live = Live { format, details: Arc::new(details) };
        let old = {
            let mut place = self.live.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *place, live)
        };
        // Outside the lock: the last handle of an image writes what it still has.
        drop(old);
    }

    /// Sets what the image reads from where it has nothing itself. The gate must be closed.
    pub(crate) fn set_backing(
        &self,
        _closed: &Closed,
        backing: Option<(Arc<Node>, Arc<dyn Format>)>,
        filename: String,
    ) {
        let mut place = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let (node, format) = backing.unzip();
        let old_details = place.details.clone();
        let Some(image) = &old_details.qcow2 else { return };
        let old_format = image.replace_backing(format);
        place.details =
            Arc::new(Details { backing: node, filename, ..Details::clone(&old_details) });
        drop(place);
        // Outside the lock: the last handle of an image writes what it still has.
        drop((old_format, old_details));
    }

    /// What the image names as its backing file now, as a path, and what QMP shows then: `shown` tells.
    pub(crate) fn set_full_backing(
        &self,
        full_backing: Option<String>,
        shown: impl FnOnce(&Details, Option<&Self>) -> String,
    ) {
        let mut place = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let mut details = Details { full_backing, ..Details::clone(&place.details) };
        details.filename = shown(&details, details.backing.as_deref());
        place.details = Arc::new(details);
    }

    /// What the image names as its backing file, and its format.
    pub(crate) fn recorded_backing(&self) -> Option<(String, String)> {
        let info = self.qcow2()?.info();
        Some((info.backing_file?, info.backing_format.unwrap_or_default()))
    }

    /// What `overlay` has to name so that this image is found below it.
    pub(crate) fn name_for(&self, overlay: &Self) -> String {
        let file = overlay.details().file.as_ref().map(|file| file.filename()).unwrap_or_default();
        crate::graph::name_for_overlay(self, std::path::Path::new(&file))
    }

    /// Whether only this node has its image: no job works on its snapshots. With the gate closed.
    pub(crate) fn is_alone_with_format(&self) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let handles = 1 + usize::from(live.details.qcow2.is_some());
        Arc::strong_count(&live.format) == handles
    }

    fn live(&self) -> Live {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn details(&self) -> Arc<Details> {
        self.live().details
    }

    pub(crate) fn storage(&self) -> Option<Arc<dyn Storage>> {
        self.details().storage.clone()
    }

    pub(crate) fn qcow2(&self) -> Option<Arc<Qcow2>> {
        self.details().qcow2.clone()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let live = self.live.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(details) = Arc::get_mut(&mut live.details) {
            let below = (details.file.take(), details.backing.take());
            // They may be the last handles of the images below, and so on.
            deep(|| drop(below));
        }
    }
}

impl Debug for Node {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::raw::Raw;
    use crate::storage::memory::MemoryStorage;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(u64, u64)>>);

    impl WriteObserver for Seen {
        fn wrote(&self, offset: u64, len: u64) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn every_change_is_told_and_nothing_after_unobserve() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 8192]));
        let node = Node::new("n", Arc::new(Raw::open(storage, false).unwrap()));
        let seen = Arc::new(Seen::default());
        let observer: Arc<dyn WriteObserver> = seen.clone();
        node.observe(observer.clone());
        node.write(512, &[WriteBuf::new(&[1; 10]), WriteBuf::new(&[2; 5])]).unwrap();
        node.write_zeroes(1024, 512, true).unwrap();
        node.discard(2048, 100).unwrap();
        node.write(8000, &[WriteBuf::new(&[1; 500])]).unwrap_err();
        node.read(0, &[ReadBuf::new(&mut [0; 512])]).unwrap();
        node.flush().unwrap();
        node.unobserve(&observer);
        node.write(0, &[WriteBuf::new(&[1])]).unwrap();
        let told = [(512, 15), (1024, 512), (2048, 100), (8000, 500)];
        assert_eq!(*seen.0.lock().unwrap(), told);
    }
}
