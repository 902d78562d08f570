//! The commands that start block jobs.

use block::jobs::Create;
use qmp::jobs::NewJob;
use qmp::schema::{CreateArguments, JobType};

use super::{Kind, NewOperation};
use crate::blocks::{Blocks, failed};

impl Blocks {
    /// blockdev-create. What it is to be made in is looked at by the job, as in QEMU.
    pub(in crate::blocks) fn create_image(
        &self,
        arguments: CreateArguments,
    ) -> Result<(), qmp::Error> {
        let operation = Create::new(&self.graph, arguments.options.0).map_err(failed)?;
        let new = NewJob::new(&arguments.job_id, JobType::Create);
        let job = NewOperation::create(&self.jobs, new, Kind::default(), Box::new(operation))?;
        Ok(job.start()?)
    }
}
