//! The commands that start block jobs.

use block::jobs::{Commit, CommitOptions, Create, OnError, Operation, Stream, StreamOptions};
use qmp::jobs::{AutoFlags, NewJob};
use qmp::schema::{BlockdevOnError, CommitArguments, CreateArguments, JobType, StreamArguments};
use qmp::{Error, ErrorClass};

use super::{JobOptions, Kind, NewOperation};
use crate::blocks::{Blocks, failed, text};

impl Blocks {
    /// blockdev-create. What it is to be made in is looked at by the job, as in QEMU.
    pub(in crate::blocks) fn create_image(&self, arguments: CreateArguments) -> Result<(), Error> {
        let operation = Create::new(&self.graph, arguments.options.0).map_err(failed)?;
        let new = NewJob::new(&arguments.job_id, JobType::Create);
        let job = NewOperation::create(&self.jobs, new, Kind::default(), Box::new(operation))?;
        Ok(job.start()?)
    }

    /// block-stream.
    pub(in crate::blocks) fn stream(&self, arguments: StreamArguments) -> Result<(), Error> {
        let job = JobOptions {
            id: arguments.job_id,
            speed: arguments.speed,
            auto_finalize: arguments.auto_finalize,
            auto_dismiss: arguments.auto_dismiss,
            group: None,
        };
        self.check_filter(arguments.filter_node_name.as_deref())?;
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
        };
        self.check_filter(arguments.filter_node_name.as_deref())?;
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

    /// Adds the job of an operation.
    fn block_job(
        &self,
        options: &JobOptions,
        kind: JobType,
        work: Kind,
        operation: Box<dyn Operation>,
    ) -> Result<NewOperation, Error> {
        let speed = options.speed.unwrap_or(0);
        if speed < 0 {
            return Err(Error::out_of_range("speed", "a non-negative value"));
        }
        let auto = AutoFlags {
            finalize: options.auto_finalize.unwrap_or(true),
            dismiss: options.auto_dismiss.unwrap_or(true),
        };
        // QEMU's default is the name of a backend, which nodes of blockdev-add do not have.
        let id = options.id.as_deref().unwrap_or_default();
        let new = NewJob { auto, speed, group: options.group, ..NewJob::new(id, kind) };
        NewOperation::create(&self.jobs, new, work, operation)
    }

    /// The name of a filter has to be one that a node could have. No node is made: writes are seen at
    /// the node itself.
    fn check_filter(&self, name: Option<&str>) -> Result<(), Error> {
        match name {
            Some(name) if !block::graph::is_well_formed(name) => {
                Err(text(format!("Invalid node-name: '{name}'")))
            }
            Some(name) if self.graph.get(name).is_some() => {
                Err(text(format!("Duplicate nodes with node-name='{name}'")))
            }
            _ => Ok(()),
        }
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
