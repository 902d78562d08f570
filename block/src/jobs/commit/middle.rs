//! block-commit of images that nobody writes to: what is in them goes into an image below.
//!
//! ```text
//!   overlay ──> top ──> middle ──> base        becomes        overlay ──> base
//! ```
//!
//! **Order.** `run` writes into the base what the images above it have: the chain reads as before at every
//! moment, because it reads all of this further up. `commit` makes the base durable, then the overlays
//! name it as their backing file, then they read from it. A crash before an overlay's name is
//! changed leaves the old chain, after it the new one; both read the same. An image between the two
//! reads something else from the first write on, and must not be used any more.

use crate::graph::{Attachment, Claim, Graph, User};
use crate::jobs::walk::{self, PIECE, ZERO_PIECE};
use crate::jobs::{Control, OnError, Operation, Side};
use crate::queue::AlignedBuf;
use crate::{Error, Node, Perm, Preallocation, Progress, ReadBuf, Result, WriteBuf};

/// An overlay, and the backing file and format that it named before.
type Renamed = (String, Option<(String, String)>);

/// A commit of images that nobody writes to; see the module.
pub(super) struct Middle {
    graph: Graph,
    top: String,
    base: String,
    /// How many images the data is taken from.
    images: u32,
    backing_file: Option<String>,
    on_error: OnError,
    /// Of the top and the base, in this order.
    users: Option<(Attachment, Attachment)>,
    claim: Option<Claim>,
    was_read_only: bool,
}

impl Middle {
    /// `chain` goes from the top to the base, both included.
    pub(super) fn new(
        graph: &Graph,
        chain: &[&str],
        backing_file: Option<String>,
        on_error: OnError,
    ) -> Result<Self> {
        let (Some(&top), Some(&base)) = (chain.first(), chain.last()) else {
            return Err(Error::Invalid("cannot commit an image into itself".to_owned()));
        };
        for overlay in graph.overlays(top) {
            graph.check_unclaimed(&overlay)?;
        }
        let claim = graph.claim(chain, "commit")?;
        let was_read_only = graph.chain(base)?[0].read_only();
        let mut middle = Self {
            graph: graph.clone(),
            top: top.to_owned(),
            base: base.to_owned(),
            images: u32::try_from(chain.len() - 1).unwrap_or(u32::MAX),
            backing_file,
            on_error,
            users: None,
            claim: Some(claim),
            was_read_only,
        };
        if was_read_only {
            graph.set_read_only(base, false)?;
        }
        // Who reads through the top does not see what is written to the base.
        let reader = User::below_others(Perm::CONSISTENT_READ, Perm::all());
        let reader = graph.attach(top, reader)?;
        let used = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        let writer = graph.attach(base, User::unnamed(used, shared))?;
        middle.users = Some((reader, writer));
        Ok(middle)
    }

    /// Reads and writes one piece, until it is done or given up.
    fn copy(
        &self,
        control: &Control,
        (top, base): (&Node, &Node),
        at: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        loop {
            if let Err(error) = top.read(at, &[ReadBuf::new(buf)]) {
                control.failed(self.on_error, Side::Source, error)?;
                continue;
            }
            match base.write(at, &[WriteBuf::new(buf)]) {
                Ok(()) => return Ok(()),
                Err(error) => control.failed(self.on_error, Side::Target, error)?,
            }
        }
    }

    fn zero(&self, control: &Control, base: &Node, at: u64, len: u64) -> Result<()> {
        while let Err(error) = base.write_zeroes(at, len, true) {
            control.failed(self.on_error, Side::Target, error)?;
        }
        Ok(())
    }

    /// What the base has past the end of the top is not seen through the top.
    fn zero_rest(&self, control: &Control, base: &Node, from: u64) -> Result<()> {
        let mut at = from;
        while at < base.size() {
            control.rest()?;
            let n = ZERO_PIECE.min(base.size() - at);
            self.zero(control, base, at, n)?;
            at += n;
        }
        Ok(())
    }

    /// Has the overlays name the base; gives what they named before.
    fn rename_overlays(&self, base: &Node) -> Result<Vec<Renamed>> {
        let mut renamed = Vec::new();
        for overlay in self.graph.overlays(&self.top) {
            let node = self.graph.chain(&overlay)?.swap_remove(0);
            let before = node.recorded_backing();
            let name = self.backing_file.clone().unwrap_or_else(|| base.name_for(&node));
            drop(node);
            if let Err(error) = self.graph.record_backing(&overlay, Some((&name, base.driver()))) {
                self.put_names_back(renamed);
                return Err(error);
            }
            renamed.push((overlay, before));
        }
        Ok(renamed)
    }

    fn put_names_back(&self, renamed: Vec<Renamed>) {
        for (overlay, before) in renamed {
            let before = before.as_ref().map(|(name, format)| (name.as_str(), format.as_str()));
            if let Err(error) = self.graph.record_backing(&overlay, before) {
                // It reads the same by either name.
                tracing::warn!(overlay, "names the base from now on: {error}");
            }
        }
    }

    fn release(&mut self) {
        if let Some((reader, writer)) = self.users.take() {
            // In this order: the writer is there only because of the reader.
            drop(writer);
            drop(reader);
        }
        self.claim = None;
        if std::mem::take(&mut self.was_read_only)
            && let Err(error) = self.graph.set_read_only(&self.base, true)
        {
            tracing::debug!(node = self.base, "stays writable: {error}");
        }
    }
}

impl Operation for Middle {
    fn run(&mut self, control: &Control) -> Result<()> {
        let Some((reader, writer)) = &self.users else { return Ok(()) };
        let (top, base) = (reader.node(), writer.node());
        let size = top.size();
        if base.size() < size {
            base.resize(size, Preallocation::Off, &Progress::default())?;
        }
        let mut buf = AlignedBuf::new(usize::try_from(PIECE).unwrap_or_default());
        let depths = 1..=self.images;
        walk::pieces(&top, &depths, (control, self.on_error), |piece| {
            if piece.zero {
                return self.zero(control, &base, piece.at, piece.len);
            }
            let len = usize::try_from(piece.len).unwrap_or_default();
            self.copy(control, (&top, &base), piece.at, &mut buf[..len])
        })?;
        self.zero_rest(control, &base, size)
    }

    fn commit(&mut self) -> Result<()> {
        let base = self.graph.chain(&self.base)?.swap_remove(0);
        base.flush()?;
        let renamed = self.rename_overlays(&base)?;
        drop(base);
        if let Some((reader, writer)) = self.users.take() {
            drop(writer);
            drop(reader);
        }
        if let Err(error) = self.graph.replace(&self.top, &self.base) {
            self.put_names_back(renamed);
            return Err(error);
        }
        self.release();
        Ok(())
    }

    fn abort(&mut self) {
        self.release();
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.release();
    }
}
