//! drive-backup and drive-mirror: the same jobs with a target that is named by its file.

use block::graph::{Below, OpenTarget, TargetFile};
use qmp::Error;
use qmp::jobs::GroupId;
use qmp::schema::{
    BackupCommon, DriveBackupArguments, DriveMirrorArguments, MirrorArguments, MirrorSyncMode,
    NewImageMode,
};

use super::NewOperation;
use crate::blocks::{Blocks, failed, text};

impl Blocks {
    /// drive-backup.
    pub(in crate::blocks) fn drive_backup(
        &self,
        arguments: &DriveBackupArguments,
    ) -> Result<(), Error> {
        let target = self.open_backup_target(arguments)?;
        Ok(self.new_drive_backup(arguments, target, None)?.start()?)
    }

    /// Makes and opens the target.
    pub(in crate::blocks) fn open_backup_target(
        &self,
        arguments: &DriveBackupArguments,
    ) -> Result<OpenTarget, Error> {
        let existing = arguments.mode == Some(NewImageMode::Existing);
        let below = match self.sync_of(&arguments.common.device, arguments.common.sync) {
            MirrorSyncMode::Top => Below::SourceBacking,
            MirrorSyncMode::None => Below::Source,
            _ => Below::Named,
        };
        let target = TargetFile {
            source: &arguments.common.device,
            filename: &arguments.target,
            format: arguments.format.as_deref(),
            existing,
            node_name: None,
            below,
        };
        self.graph.open_target(&target).map_err(failed)
    }

    /// The job of a backup, whose moment is now.
    pub(in crate::blocks) fn new_drive_backup(
        &self,
        arguments: &DriveBackupArguments,
        target: OpenTarget,
        group: Option<GroupId>,
    ) -> Result<NewOperation, Error> {
        let common = &arguments.common;
        let sync = self.sync_of(&common.device, common.sync);
        let common = BackupCommon { sync, ..common.clone() };
        let job = self.new_backup(&common, target.name(), group)?;
        target.taken();
        Ok(job)
    }

    /// drive-mirror.
    pub(in crate::blocks) fn drive_mirror(
        &self,
        arguments: DriveMirrorArguments,
    ) -> Result<(), Error> {
        let device = &arguments.device;
        self.graph.get(device).ok_or_else(|| Error::no_node(device))?;
        self.graph.check_root(device).map_err(failed)?;
        if arguments.replaces.is_some() && arguments.node_name.is_none() {
            let words = "a node-name must be provided when replacing a named node of the graph";
            return Err(text(words));
        }
        let existing = arguments.mode == Some(NewImageMode::Existing);
        let sync = self.sync_of(&arguments.device, arguments.sync);
        let below = match sync {
            MirrorSyncMode::Top => Below::SourceBacking,
            MirrorSyncMode::None if !existing => {
                return Err(text(
                    "sync 'none' of drive-mirror needs mode 'existing'; blockdev-mirror takes a \
                     target with any backing file",
                ));
            }
            _ => Below::Nothing,
        };
        let target = TargetFile {
            source: &arguments.device,
            filename: &arguments.target,
            format: arguments.format.as_deref(),
            existing,
            node_name: arguments.node_name.as_deref(),
            below,
        };
        let target = self.graph.open_target(&target).map_err(failed)?;
        let new = MirrorArguments {
            job_id: arguments.job_id,
            device: arguments.device,
            target: target.name().to_owned(),
            replaces: arguments.replaces,
            sync,
            speed: arguments.speed,
            granularity: arguments.granularity,
            buf_size: arguments.buf_size,
            on_source_error: arguments.on_source_error,
            on_target_error: arguments.on_target_error,
            filter_node_name: None,
            copy_mode: arguments.copy_mode,
            auto_finalize: arguments.auto_finalize,
            auto_dismiss: arguments.auto_dismiss,
        };
        self.mirror_with(new, arguments.unmap.unwrap_or(true))?;
        target.taken();
        Ok(())
    }

    /// Of an image with nothing below it, `top` is all, as in QEMU.
    fn sync_of(&self, device: &str, sync: MirrorSyncMode) -> MirrorSyncMode {
        let alone = self.graph.get(device).is_some_and(|node| node.backing().is_none());
        if sync == MirrorSyncMode::Top && alone { MirrorSyncMode::Full } else { sync }
    }
}
