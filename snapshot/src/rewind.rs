//! Going back to the checkpoint that RAM is based on: only what was written since is put back.
//!
//! What is needed again and again is kept: which snapshots they are, and the contents of the pages
//! that were put back before.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Weak};

use block::{Format, Node, ReadBuf, SnapshotInfo};

use crate::GuestMemory;
use crate::format::ram::RamLayout;
use crate::load::Checkpoint;
use crate::memory;
use crate::nodes::{find_tag, kept_tag};
use crate::track::{PageRun, PageSet};
use crate::units::{MIB, PAGE, index};

/// Most pages that are put back one by one, and that are kept: 64 MiB.
pub const MOST_PAGES: u64 = 64 * MIB / PAGE;

/// Largest read in pages.
const CHUNK: u64 = 256;

/// A checkpoint that RAM is based on, to be gone back to quickly.
pub struct Rewinder {
    nodes: Vec<Kept>,
    vmstate: usize,
    tag: String,
    layout: RamLayout,
    /// Contents by region and page.
    clean: HashMap<(usize, u64), Box<[u8]>>,
}

/// A node's image and its snapshot. A weak reference, so that nothing is kept from being closed or
/// replaced by what may never be used again.
struct Kept {
    node: String,
    format: Weak<dyn Format>,
    snapshot: SnapshotInfo,
}

impl Kept {
    fn of(node: &Node, format: &Arc<dyn Format>, snapshot: SnapshotInfo) -> Self {
        Self { node: node.name().to_owned(), format: Arc::downgrade(format), snapshot }
    }
}

impl Rewinder {
    /// Keeps what is needed of a checkpoint that was loaded.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        let kept = |(node, format, snapshot): (&Arc<Node>, &Arc<dyn Format>, &SnapshotInfo)| {
            Kept::of(node, format, snapshot.clone())
        };
        Self {
            nodes: checkpoint.parts().map(kept).collect(),
            vmstate: checkpoint.vmstate_at(),
            tag: checkpoint.info().tag.clone(),
            layout: checkpoint.layout().clone(),
            clean: HashMap::new(),
        }
    }

    /// The same of a checkpoint that was just saved on `nodes`, with `vmstate` the name of the one that has
    /// RAM. `None` where it is gone already.
    pub(crate) fn saved(
        nodes: &[Arc<Node>],
        vmstate: &str,
        tag: &str,
        layout: RamLayout,
    ) -> Option<Self> {
        let kept = |node: &Arc<Node>| Some(Kept::of(node, &node.format(), find_tag(node, tag)?));
        Some(Self {
            nodes: nodes.iter().map(kept).collect::<Option<_>>()?,
            vmstate: nodes.iter().position(|node| node.name() == vmstate)?,
            tag: kept_tag(tag).to_owned(),
            layout,
            clean: HashMap::new(),
        })
    }

    /// Whether a load of `tag` from `nodes`, with the VM state on `vmstate`, is of this checkpoint,
    /// which is there as it was, and no disk was written since it was as in it. Anything
    /// else, errors included, is no: the load as a whole finds out.
    pub fn is_current(&self, nodes: &[Arc<Node>], vmstate: &str, tag: &str) -> bool {
        let same = |(kept, node): (&Kept, &Arc<Node>)| {
            let format = node.format();
            kept.node == node.name()
                && std::ptr::addr_eq(kept.format.as_ptr(), Arc::as_ptr(&format))
                && find_tag(node, tag).as_ref() == Some(&kept.snapshot)
                && format.is_at_snapshot(&kept.snapshot.id).unwrap_or(false)
        };
        self.tag == tag
            && self.nodes.len() == nodes.len()
            && self.nodes[self.vmstate].node == vmstate
            && self.nodes.iter().zip(nodes).all(same)
    }

    /// Puts back the pages of `dirty`. All are at hand before the first is: after an error RAM is as
    /// it was. The vCPUs and devices are stopped.
    ///
    /// # Errors
    /// There are more than [`MOST_PAGES`], or the image cannot be read.
    pub fn put_back(&mut self, ram: &GuestMemory, dirty: &PageSet) -> block::Result<()> {
        if dirty.count() > MOST_PAGES {
            let text = format!("{} pages are too many to be put back", dirty.count());
            return Err(block::Error::NotSupported(text));
        }
        self.fetch(dirty)?;
        let slices = memory::slices(ram);
        for PageRun { region, first, count } in dirty.runs() {
            for page in first..first + count {
                let Some(contents) = self.clean.get(&(region, page)) else { continue };
                slices[region].put(page * PAGE, contents);
            }
        }
        Ok(())
    }

    /// Reads those of the pages that are not kept.
    fn fetch(&mut self, pages: &PageSet) -> block::Result<()> {
        if self.clean.len() as u64 + pages.count() > MOST_PAGES {
            self.clean.retain(|&(region, page), _| pages.contains(region, page));
        }
        let Kept { format, snapshot, .. } = &self.nodes[self.vmstate];
        let gone = || block::Error::Invalid("the image of the checkpoint was closed".to_owned());
        let format = format.upgrade().ok_or_else(gone)?;
        let mut vmstate = None;
        for piece in pages.runs().flat_map(|run| run.pieces(CHUNK)) {
            let PageRun { region, first, count } = piece;
            if (first..first + count).all(|page| self.clean.contains_key(&(region, page))) {
                continue;
            }
            let vmstate = match &mut vmstate {
                Some(vmstate) => vmstate,
                none => none.insert(format.open_vmstate(&snapshot.id)?),
            };
            let mut bytes = vec![0; index(piece.len())];
            let offset = self.layout.regions()[region].offset.0 + piece.offset();
            vmstate.read(offset, &[ReadBuf::new(&mut bytes)])?;
            for (page, contents) in (first..).zip(bytes.chunks(index(PAGE))) {
                if let Entry::Vacant(vacant) = self.clean.entry((region, page)) {
                    vacant.insert(contents.into());
                }
            }
        }
        Ok(())
    }
}
