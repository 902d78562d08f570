//! blockdev-snapshot and blockdev-snapshot-sync as actions.

use block::graph::ExternalSnapshot;
use qmp::schema::{BlockdevSnapshot, BlockdevSnapshotSync};
use qmp::transaction::Action;

use crate::blocks::graph::{prepare_snapshot, prepare_snapshot_sync};
use crate::blocks::{Blocks, failed};

/// Which of the two commands.
#[derive(Clone, Copy)]
pub(super) enum Which<'a> {
    Node(&'a BlockdevSnapshot),
    File(&'a BlockdevSnapshotSync),
}

pub(super) struct External<'a> {
    blocks: &'a Blocks,
    which: Which<'a>,
    snapshot: Option<ExternalSnapshot>,
}

impl<'a> External<'a> {
    pub(super) fn new(blocks: &'a Blocks, which: Which<'a>) -> Self {
        Self { blocks, which, snapshot: None }
    }
}

impl Action for External<'_> {
    fn prepares_long(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<(), qmp::Error> {
        let graph = self.blocks.graph();
        self.snapshot = Some(match self.which {
            Which::Node(arguments) => prepare_snapshot(graph, arguments)?,
            Which::File(arguments) => prepare_snapshot_sync(graph, arguments)?,
        });
        Ok(())
    }

    fn point(&mut self) -> Result<(), qmp::Error> {
        self.snapshot.as_mut().map_or(Ok(()), |snapshot| snapshot.commit().map_err(failed))
    }

    fn released(&mut self) {
        if let Some(snapshot) = self.snapshot.take() {
            snapshot.finish();
        }
    }

    fn abort(&mut self) {
        if let Some(snapshot) = self.snapshot.take() {
            snapshot.abort();
        }
    }
}
