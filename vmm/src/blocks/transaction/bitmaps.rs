//! Actions on dirty bitmaps. Requests are held back from their point to their end, so that an undo
//! forgets no write.

use std::sync::Arc;

use block::Node;
use block::bitmap::{BitmapHold, BitmapUndo};
use qmp::schema::{BitmapAddArguments, BitmapArguments, BitmapMergeArguments};
use qmp::transaction::Action;

use crate::blocks::{Blocks, failed};

/// What is done to a bitmap.
#[derive(Clone, Copy)]
pub(super) enum Change<'a> {
    Add(&'a BitmapAddArguments),
    Remove(&'a BitmapArguments),
    Clear(&'a BitmapArguments),
    Enable(&'a BitmapArguments, bool),
    Merge(&'a BitmapMergeArguments),
}

pub(super) struct BitmapAction<'a> {
    blocks: &'a Blocks,
    change: Change<'a>,
    /// What there was before, once it is changed.
    before: Option<BitmapUndo>,
    added: bool,
    /// Keeps one that is to go from later actions, as QEMU does.
    busy: Option<BitmapHold>,
}

impl<'a> BitmapAction<'a> {
    pub(super) fn new(blocks: &'a Blocks, change: Change<'a>) -> Self {
        Self { blocks, change, before: None, added: false, busy: None }
    }

    fn node(&self, name: &str) -> Result<Arc<Node>, qmp::Error> {
        self.blocks.graph().get(name).ok_or_else(|| qmp::Error::no_node(name))
    }

    /// Does something to a bitmap that is remembered before, if it is there.
    fn change(
        &mut self,
        node: &str,
        name: &str,
        change: impl FnOnce(&Node) -> block::Result<()>,
    ) -> Result<(), qmp::Error> {
        let node = self.node(node)?;
        // Where there is none the change itself says so.
        let before = node.bitmap_undo(name).ok();
        change(&node).map_err(failed)?;
        self.before = before;
        Ok(())
    }

    /// A bitmap that is to be removed: refused here, removed when nothing else can fail.
    fn claim(&mut self, arguments: &BitmapArguments) -> Result<(), qmp::Error> {
        let node = self.node(&arguments.node)?;
        let bitmap = node.bitmaps().get(&arguments.name).map_err(failed)?;
        // Nobody else can do anything to one that is inconsistent.
        if !bitmap.inconsistent() {
            self.busy = Some(bitmap.hold().map_err(failed)?);
        }
        Ok(())
    }
}

impl Action for BitmapAction<'_> {
    fn point(&mut self) -> Result<(), qmp::Error> {
        match self.change {
            Change::Add(arguments) => {
                self.blocks.add_bitmap(arguments)?;
                self.added = true;
                Ok(())
            }
            Change::Remove(arguments) => self.claim(arguments),
            Change::Clear(BitmapArguments { node, name }) => {
                self.change(node, name, |node| node.clear_bitmap(name))
            }
            Change::Enable(BitmapArguments { node, name }, on) => {
                self.change(node, name, |node| node.enable_bitmap(name, on))
            }
            Change::Merge(arguments) => {
                let node = self.node(&arguments.node)?;
                let before = node.bitmap_undo(&arguments.target).ok();
                self.blocks.merge_bitmaps(arguments)?;
                self.before = before;
                Ok(())
            }
        }
    }

    fn publish(&mut self) -> Result<(), qmp::Error> {
        let Change::Remove(BitmapArguments { node, name }) = self.change else { return Ok(()) };
        self.busy = None;
        self.change(node, name, |node| node.remove_bitmap(name))
    }

    fn abort(&mut self) {
        self.busy = None;
        if let Some(before) = self.before.take() {
            before.restore();
        }
        if let Change::Add(BitmapAddArguments { node, name, .. }) = self.change
            && self.added
        {
            // It was never stored, so nothing can fail but by a mistake.
            let removed = self.node(node).map(|node| node.remove_bitmap(name));
            if let Ok(Err(error)) = removed {
                tracing::error!("bitmap '{name}' of a transaction that failed stays: {error}");
            }
        }
    }
}
