//! Jobs: the list of all of them, and block operations that run as jobs.

mod commands;
mod drive;
mod list;
mod make;
mod operation;

pub use commands::{is_job_command, run};
pub use list::JobList;
pub use operation::{Filter, JobOptions, Kind, NewOperation, RunningMirror};
