//! Named images.

use std::fmt::{self, Debug, Formatter};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, PoisonError, RwLock};

use crate::SnapshotInfo;
use crate::bitmap::BitmapSet;
use crate::format::Format;
use crate::graph::{DetectZeroes, Flags, NodeOptions};
use crate::qcow2::Qcow2;
use crate::stack::deep;
use crate::storage::{Discards, FileStorage, Highest, Storage};

mod access;
mod backing;
mod gate;
mod intercept;
mod jobs;
mod link;
mod observe;
mod replace;
mod requests;

pub use access::Access;
use gate::Gate;
pub(crate) use gate::{Closed, Holding};
use intercept::Interception;
pub use intercept::{Change, ChangeKind, Interceptor, Turn};
pub use jobs::{Occupied, Saving};
pub use link::{Entered, Link};
pub use observe::WriteObserver;

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
    /// End of the highest write since it was opened.
    highest: Highest,
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
            highest: Highest::default(),
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
    pub(crate) fn refuses_writes(&self) -> bool {
        let damaged = || self.qcow2().is_some_and(|image| image.refuses_writes());
        self.read_only() || (!self.is_inactive() && damaged())
    }

    /// Whether [`Node::write_zeroes`] is faster than writing zeroes.
    pub(crate) fn fast_zeroes(&self) -> bool {
        self.look(|format| format.fast_zeroes())
    }

    /// The internal snapshots in table order.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.look(|format| format.snapshots())
    }

    fn detect_zeroes(&self) -> DetectZeroes {
        self.live.read().unwrap_or_else(PoisonError::into_inner).details.flags.detect_zeroes
    }
    /// The file it is in, as QMP shows it; empty for a node outside a graph.
    pub fn filename(&self) -> String {
        self.details().filename.clone()
    }

    /// End of the highest write since it was opened, in bytes: of the guest's disk, or, of a file's own
    /// node, of the file.
    pub fn highest_write(&self) -> u64 {
        match &self.details().host {
            Some(file) => file.highest_write(),
            None => self.highest.get(),
        }
    }

    /// Discards of the host file, where the node is the file's own.
    pub fn file_discards(&self) -> Option<Discards> {
        self.details().host.as_ref().map(|file| file.discards())
    }

    /// The node of the file that the image is in.
    pub fn file_node(&self) -> Option<Arc<Node>> {
        self.details().file.clone()
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
