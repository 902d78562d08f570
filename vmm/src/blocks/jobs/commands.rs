//! The commands about jobs: the same beside a guest and without one. None waits for anything, so they
//! may run on any thread.

use qmp::jobs::Jobs;
use qmp::schema::{Command, JobType, MirrorCopyMode};
use serde::Serialize;
use serde_json::json;

use super::JobList;
use crate::blocks::Answer;

/// Whether a command is for [`run`].
pub fn is_job_command(command: &Command) -> bool {
    matches!(
        command,
        Command::QueryJobs
            | Command::QueryBlockJobs
            | Command::JobCancel(_)
            | Command::JobPause(_)
            | Command::JobResume(_)
            | Command::JobComplete(_)
            | Command::JobFinalize(_)
            | Command::JobDismiss(_)
            | Command::BlockJobCancel(_)
            | Command::BlockJobPause(_)
            | Command::BlockJobResume(_)
            | Command::BlockJobComplete(_)
            | Command::BlockJobFinalize(_)
            | Command::BlockJobDismiss(_)
            | Command::BlockJobSetSpeed(_)
            | Command::BlockJobChange(_)
    )
}

/// When a command is answered.
enum When {
    /// At once.
    Now(Answer),
    /// When the job of that id and those it ends with are concluded, after their events.
    Over(String),
}

/// Carries out a command about jobs and answers it.
pub fn run(list: &JobList, request: qmp::Request) {
    let mut jobs = list.lock();
    let when = execute(&mut jobs, request.command).unwrap_or_else(|error| When::Now(Err(error)));
    let reply = request.reply;
    match when {
        When::Now(answer) => reply.send(answer),
        When::Over(id) => jobs.when_over(&id, move || reply.send(done())),
    }
}

fn execute(jobs: &mut Jobs, command: Command) -> Result<When, qmp::Error> {
    match command {
        Command::QueryJobs => return Ok(When::Now(value(&jobs.query()))),
        Command::QueryBlockJobs => return Ok(When::Now(value(&jobs.query_block()))),
        Command::JobCancel(arguments) => {
            let kind = jobs.get(&arguments.id).map(|job| job.kind);
            jobs.cancel(&arguments.id)?;
            // A save has RAM to give back; as QEMU has no such cancel, nobody expects it to wait.
            if !kind.is_some_and(is_snapshot) {
                return Ok(When::Over(arguments.id));
            }
        }
        Command::JobPause(arguments) => jobs.pause(&arguments.id)?,
        Command::JobResume(arguments) => jobs.resume(&arguments.id)?,
        Command::JobComplete(arguments) => jobs.complete(&arguments.id)?,
        Command::JobFinalize(arguments) => {
            jobs.finalize(&arguments.id)?;
            return Ok(When::Over(arguments.id));
        }
        Command::JobDismiss(arguments) => jobs.dismiss(&arguments.id)?,
        Command::BlockJobCancel(arguments) => {
            let force = arguments.force.unwrap_or(false);
            jobs.block_cancel(&arguments.device, force)?;
            if !jobs.is_ending_well(&arguments.device) {
                return Ok(When::Over(arguments.device));
            }
        }
        Command::BlockJobPause(arguments) => {
            jobs.require_block(&arguments.device)?;
            jobs.pause(&arguments.device)?;
        }
        Command::BlockJobResume(arguments) => {
            jobs.require_block(&arguments.device)?;
            jobs.resume(&arguments.device)?;
        }
        Command::BlockJobComplete(arguments) => {
            jobs.require_block(&arguments.device)?;
            jobs.complete(&arguments.device)?;
        }
        Command::BlockJobFinalize(arguments) => {
            jobs.require_block(&arguments.id)?;
            jobs.finalize(&arguments.id)?;
            return Ok(When::Over(arguments.id));
        }
        Command::BlockJobDismiss(arguments) => {
            jobs.require_block(&arguments.id)?;
            jobs.dismiss(&arguments.id)?;
        }
        Command::BlockJobSetSpeed(arguments) => {
            jobs.set_speed(&arguments.device, arguments.speed)?;
        }
        Command::BlockJobChange(arguments) => {
            // The type says which other members there are; it need not be the job's, as in QEMU.
            let mode = match (arguments.kind, arguments.copy_mode) {
                (JobType::Mirror, Some(mode)) => mode,
                (JobType::Mirror, None) => {
                    return Err(qmp::Error::missing_parameter("copy-mode"));
                }
                (_, Some(_)) => return Err(qmp::Error::unexpected_parameter("copy-mode")),
                (_, None) => MirrorCopyMode::Background,
            };
            jobs.change(&arguments.id, mode)?;
        }
        other => return Err(qmp::Error::command_not_found(other.name())),
    }
    Ok(When::Now(done()))
}

fn is_snapshot(kind: JobType) -> bool {
    matches!(kind, JobType::SnapshotSave | JobType::SnapshotLoad | JobType::SnapshotDelete)
}

fn done() -> Answer {
    Ok(json!({}))
}

fn value(value: &impl Serialize) -> Answer {
    serde_json::to_value(value).map_err(|error| qmp::Error::generic(error.to_string()))
}
