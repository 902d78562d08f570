//! The commands that start block jobs.

use block::jobs::{
    Backup, BackupOptions, BitmapMode, Commit, CommitOptions, CopyMode, Create, Mirror,
    MirrorOptions, OnError, Operation, Stream, StreamOptions, SyncMode,
};
use qmp::jobs::{AutoFlags, GroupId, NewJob};
use qmp::schema::{
    BackupArguments, BackupCommon, BitmapSyncMode, BlockdevOnError, CommitArguments,
    CreateArguments, JobType, MirrorArguments, MirrorCopyMode, MirrorSyncMode, StreamArguments,
};
use qmp::{Error, ErrorClass};

use super::{Filter, JobOptions, Kind, NewOperation, RunningMirror};
use crate::blocks::{Blocks, failed, text};

impl Blocks {
    /// blockdev-create. What it is to be made in is looked at by the job, as in QEMU.
    pub(in crate::blocks) fn create_image(&self, arguments: CreateArguments) -> Result<(), Error> {
        let operation = Create::new(&self.graph, arguments.options.0).map_err(failed)?;
        let new = NewJob::new(&arguments.job_id, JobType::Create);
        let job = NewOperation::create(&self.jobs, new, Kind::default(), Box::new(operation))?;
        Ok(job.start()?)
    }

    /// blockdev-backup.
    pub(in crate::blocks) fn backup(&self, arguments: &BackupArguments) -> Result<(), Error> {
        Ok(self.new_backup(&arguments.common, &arguments.target, None)?.start()?)
    }

    /// The job of a backup, whose moment is now.
    pub(in crate::blocks) fn new_backup(
        &self,
        arguments: &BackupCommon,
        target: &str,
        group: Option<GroupId>,
    ) -> Result<NewOperation, Error> {
        let job = JobOptions {
            id: arguments.job_id.clone(),
            speed: arguments.speed,
            auto_finalize: arguments.auto_finalize,
            auto_dismiss: arguments.auto_dismiss,
            group,
            filter: Filter::inserted(arguments.filter_node_name.clone()),
        };
        let options = BackupOptions {
            bitmap: arguments.bitmap.clone(),
            bitmap_mode: arguments.bitmap_mode.map(|mode| match mode {
                BitmapSyncMode::OnSuccess => BitmapMode::OnSuccess,
                BitmapSyncMode::Never => BitmapMode::Never,
                BitmapSyncMode::Always => BitmapMode::Always,
            }),
            compress: arguments.compress.unwrap_or(false),
            on_source_error: on_error(arguments.on_source_error),
            on_target_error: on_error(arguments.on_target_error),
            ..BackupOptions::new(&arguments.device, target, sync(arguments.sync))
        };
        let operation = Backup::new(&self.graph, options).map_err(failed)?;
        self.block_job(&job, JobType::Backup, Kind::default(), Box::new(operation))
    }

    /// blockdev-mirror.
    pub(in crate::blocks) fn mirror(&self, arguments: MirrorArguments) -> Result<(), Error> {
        self.mirror_with(arguments, true)
    }

    /// A mirror; with `unmap` zeroes take no space in the target.
    pub(super) fn mirror_with(&self, arguments: MirrorArguments, unmap: bool) -> Result<(), Error> {
        let job = JobOptions {
            id: arguments.job_id,
            speed: arguments.speed,
            auto_finalize: arguments.auto_finalize,
            auto_dismiss: arguments.auto_dismiss,
            group: None,
            filter: Filter::new(arguments.filter_node_name),
        };
        let copy_mode = arguments.copy_mode.unwrap_or(MirrorCopyMode::Background);
        let options = MirrorOptions {
            replaces: arguments.replaces,
            copy_mode: match copy_mode {
                MirrorCopyMode::Background => CopyMode::Background,
                MirrorCopyMode::WriteBlocking => CopyMode::WriteBlocking,
            },
            granularity: arguments.granularity.map(u64::from),
            buf_size: arguments.buf_size.unwrap_or(0),
            on_source_error: on_error(arguments.on_source_error),
            on_target_error: on_error(arguments.on_target_error),
            unmap,
            ..MirrorOptions::new(&arguments.device, &arguments.target, sync(arguments.sync))
        };
        let operation = Mirror::new(&self.graph, options).map_err(failed)?;
        let mirror = RunningMirror::new(operation.handle(), copy_mode);
        let kind = Kind { completes: true, mirror: Some(mirror) };
        Ok(self.block_job(&job, JobType::Mirror, kind, Box::new(operation))?.start()?)
    }

    /// block-stream.
    pub(in crate::blocks) fn stream(&self, arguments: StreamArguments) -> Result<(), Error> {
        let job = JobOptions {
            id: arguments.job_id,
            speed: arguments.speed,
            auto_finalize: arguments.auto_finalize,
            auto_dismiss: arguments.auto_dismiss,
            group: None,
            filter: Filter::inserted(arguments.filter_node_name),
        };
        let options = StreamOptions {
            device: arguments.device,
            base: arguments.base,
            base_node: arguments.base_node,
            bottom: arguments.bottom,
            backing_file: arguments.backing_file,
            on_error: on_error(arguments.on_error),
        };
        let operation = Stream::new(&self.graph, &options).map_err(failed)?;
        let kind = Kind::default();
        Ok(self.block_job(&job, JobType::Stream, kind, Box::new(operation))?.start()?)
    }

    /// block-commit.
    pub(in crate::blocks) fn commit(&self, arguments: CommitArguments) -> Result<(), Error> {
        let device = arguments.device;
        if self.graph.get(&device).is_none() {
            let words = format!("Device '{device}' not found");
            return Err(Error::new(ErrorClass::DeviceNotFound, words));
        }
        let job = JobOptions {
            id: arguments.job_id,
            speed: arguments.speed,
            auto_finalize: arguments.auto_finalize,
            auto_dismiss: arguments.auto_dismiss,
            group: None,
            filter: Filter::new(arguments.filter_node_name),
        };
        let options = CommitOptions {
            device,
            top: arguments.top,
            top_node: arguments.top_node,
            base: arguments.base,
            base_node: arguments.base_node,
            backing_file: arguments.backing_file,
            on_error: on_error(arguments.on_error),
        };
        let operation = Commit::new(&self.graph, &options).map_err(failed)?;
        let kind = Kind { completes: operation.is_active(), ..Kind::default() };
        Ok(self.block_job(&job, JobType::Commit, kind, Box::new(operation))?.start()?)
    }

    /// Adds the job of an operation, which is undone if it cannot be added.
    fn block_job(
        &self,
        options: &JobOptions,
        kind: JobType,
        work: Kind,
        mut operation: Box<dyn Operation>,
    ) -> Result<NewOperation, Error> {
        // As in QEMU, where the filter is made when the nodes are known to do.
        if let Err(error) = self.check_filter(&options.filter) {
            operation.abort();
            return Err(error);
        }
        let auto = AutoFlags {
            finalize: options.auto_finalize.unwrap_or(true),
            dismiss: options.auto_dismiss.unwrap_or(true),
        };
        // QEMU's default is the name of a backend, which nodes of blockdev-add do not have.
        let id = options.id.as_deref().unwrap_or_default();
        let speed = options.speed.unwrap_or(0);
        let new = NewJob { auto, speed, group: options.group, ..NewJob::new(id, kind) };
        NewOperation::create(&self.jobs, new, work, operation)
    }

    /// The name of a filter has to be one that a node could have. No node is made: writes are seen at
    /// the node itself.
    fn check_filter(&self, filter: &Filter) -> Result<(), Error> {
        let Some(name) = &filter.name else { return Ok(()) };
        let words = match block::graph::check_name(name) {
            Err(error) => error.to_string(),
            Ok(()) if self.graph.get(name).is_some() => {
                format!("Duplicate nodes with node-name='{name}'")
            }
            Ok(()) => return Ok(()),
        };
        Err(text(format!("{}{words}", filter.before_error)))
    }
}

fn sync(mode: MirrorSyncMode) -> SyncMode {
    match mode {
        MirrorSyncMode::Top => SyncMode::Top,
        MirrorSyncMode::Full => SyncMode::Full,
        MirrorSyncMode::None => SyncMode::None,
        MirrorSyncMode::Incremental => SyncMode::Incremental,
        MirrorSyncMode::Bitmap => SyncMode::Bitmap,
    }
}

/// `auto` is what QEMU's devices do: they stop where there is no space.
fn on_error(policy: Option<BlockdevOnError>) -> OnError {
    match policy {
        None | Some(BlockdevOnError::Report) => OnError::Report,
        Some(BlockdevOnError::Ignore) => OnError::Ignore,
        Some(BlockdevOnError::Enospc | BlockdevOnError::Auto) => OnError::Enospc,
        Some(BlockdevOnError::Stop) => OnError::Stop,
    }
}
