//! blockdev-backup as an action: its moment is the transaction's, its job starts when all count.

use qmp::jobs::GroupId;
use qmp::schema::BackupArguments;
use qmp::transaction::Action;

use crate::blocks::Blocks;
use crate::blocks::jobs::NewOperation;

pub(super) struct Backup<'a> {
    blocks: &'a Blocks,
    arguments: &'a BackupArguments,
    group: Option<GroupId>,
    /// Created, not started. Dropped, it goes again.
    job: Option<NewOperation>,
}

impl<'a> Backup<'a> {
    pub(super) fn new(
        blocks: &'a Blocks,
        arguments: &'a BackupArguments,
        group: Option<GroupId>,
    ) -> Self {
        Self { blocks, arguments, group, job: None }
    }
}

impl Action for Backup<'_> {
    fn point(&mut self) -> Result<(), qmp::Error> {
        self.job = Some(self.blocks.new_backup(self.arguments, self.group)?);
        Ok(())
    }

    fn commit(&mut self) {
        if let Some(job) = self.job.take()
            && let Err(error) = job.start()
        {
            // A client has cancelled it meanwhile.
            tracing::debug!("{error}");
        }
    }

    fn abort(&mut self) {
        self.job = None;
    }
}
