//! blockdev-backup and drive-backup as actions: its moment is the transaction's, its job starts when all count.

use block::graph::OpenTarget;
use qmp::jobs::GroupId;
use qmp::schema::{BackupArguments, DriveBackupArguments};
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
        let BackupArguments { common, target } = self.arguments;
        self.job = Some(self.blocks.new_backup(common, target, self.group)?);
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

/// The same with a target that is made before the moment.
pub(super) struct DriveBackup<'a> {
    blocks: &'a Blocks,
    arguments: &'a DriveBackupArguments,
    group: Option<GroupId>,
    target: Option<OpenTarget>,
    job: Option<NewOperation>,
}

impl<'a> DriveBackup<'a> {
    pub(super) fn new(
        blocks: &'a Blocks,
        arguments: &'a DriveBackupArguments,
        group: Option<GroupId>,
    ) -> Self {
        Self { blocks, arguments, group, target: None, job: None }
    }
}

impl Action for DriveBackup<'_> {
    fn prepares_long(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<(), qmp::Error> {
        self.target = Some(self.blocks.open_backup_target(self.arguments)?);
        Ok(())
    }

    fn point(&mut self) -> Result<(), qmp::Error> {
        let Some(target) = self.target.take() else { return Ok(()) };
        self.job = Some(self.blocks.new_drive_backup(self.arguments, target, self.group)?);
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
        self.target = None;
    }
}
