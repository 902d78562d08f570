//! A node under a name that clients ask for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bitmap::{Bitmap, BitmapHold};
use crate::graph::Attachment;
use crate::{Error, Link, Node, Result};

use super::negotiate::{ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Offered};
use super::wire::MAX_STRING;

/// QMP's `BlockExportOptionsNbd`.
pub struct ExportOptions {
    /// The export's id, unique among all exports.
    pub id: String,
    /// The name clients ask for, unique in the server.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// The use of the node; ends with the export.
    pub attachment: Attachment,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether to offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Dirty bitmaps to offer, busy as long as the export lives.
    pub bitmaps: Vec<BitmapHold>,
}

/// What QMP's `query-block-exports` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The export's id.
    pub id: String,
    /// The name clients ask for.
    pub name: String,
    /// The node's name.
    pub node_name: String,
    /// Whether it was removed and waits for its last connection to end.
    pub shutting_down: bool,
}

/// Told when an export is gone, with its id.
pub(super) type OnGone = Arc<dyn Fn(&str) + Send + Sync>;

/// An export in use. Dropping the last handle ends the use of the node, then tells of it.
pub(super) struct Export {
    pub(super) id: String,
    name: String,
    description: Option<String>,
    link: Link,
    attachment: Option<Attachment>,
    writable: bool,
    multi_conn: bool,
    allocation_depth: bool,
    bitmaps: Vec<BitmapHold>,
    closing: AtomicBool,
    on_gone: OnGone,
}

/// Enough of a text that is too long to tell which it is.
fn start_of(text: &str) -> String {
    text.chars().take(32).chain("...".chars()).collect()
}

impl Export {
    /// # Errors
    /// If name or description are longer than the protocol allows, or the node refuses writes.
    pub(super) fn new(options: ExportOptions, multi_conn: bool, on_gone: OnGone) -> Result<Self> {
        let link = options.attachment.link().clone();
        if options.name.len() > MAX_STRING {
            return Err(Error::Invalid(format!(
                "export name '{}' too long",
                start_of(&options.name)
            )));
        }
        if let Some(text) = options.description.as_ref().filter(|text| text.len() > MAX_STRING) {
            return Err(Error::Invalid(format!("description '{}' too long", start_of(text))));
        }
        if options.writable && link.node().refuses_writes() {
            return Err(Error::Invalid("Block node is read-only".to_owned()));
        }
        Ok(Self {
            id: options.id,
            name: options.name,
            description: options.description,
            link,
            attachment: Some(options.attachment),
            writable: options.writable,
            multi_conn,
            allocation_depth: options.allocation_depth,
            bitmaps: options.bitmaps,
            closing: AtomicBool::new(false),
            on_gone,
        })
    }

    /// The node as it is now.
    pub(super) fn node(&self) -> Arc<Node> {
        self.link.node()
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// No connection may begin to use it.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn info(&self) -> ExportInfo {
        ExportInfo {
            id: self.id.clone(),
            name: self.name.clone(),
            node_name: self.node().name().to_owned(),
            shutting_down: self.is_closing(),
        }
    }

    /// What a context id of [`Offered::contexts`] means.
    pub(super) fn context(&self, id: u32) -> Option<Context<'_>> {
        let mut id = usize::try_from(id).ok()?;
        if id == 0 {
            return Some(Context::Allocation);
        }
        if self.allocation_depth {
            if id == 1 {
                return Some(Context::Depth);
            }
            id -= 1;
        }
        self.bitmaps.get(id - 1).map(|bitmap| Context::Bitmap(bitmap.bitmap()))
    }
}

/// What block status can be told of.
pub(super) enum Context<'a> {
    Allocation,
    Depth,
    Bitmap(&'a Bitmap),
}

impl Drop for Export {
    fn drop(&mut self) {
        // Bitmaps and node are free by the time anybody hears of it.
        self.bitmaps.clear();
        self.attachment = None;
        (self.on_gone)(&self.id);
    }
}

impl Offered for Arc<Export> {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    fn size(&self) -> u64 {
        self.node().size()
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn multi_conn(&self) -> bool {
        self.multi_conn
    }

    fn contexts(&self) -> Vec<String> {
        let depth = self.allocation_depth.then(|| ALLOCATION_DEPTH.to_owned());
        let bitmaps =
            self.bitmaps.iter().map(|bitmap| format!("{DIRTY_BITMAP}{}", bitmap.bitmap().name()));
        std::iter::once(BASE_ALLOCATION.to_owned()).chain(depth).chain(bitmaps).collect()
    }
}
