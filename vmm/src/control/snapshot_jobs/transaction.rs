//! A transaction with the machine's state in it, which is a job that a client may not know of.

use qmp::jobs::{AutoFlags, NewJob};
use qmp::schema::{JobType, TransactionAction, TransactionArguments};
use snapshot::About;

use super::{Handle, Queued, Waiting};
use crate::control::Controller;
use crate::control::work::Task;

/// The id of a job that no client knows of.
const HIDDEN: &str = "#transaction";

impl Controller {
    /// A transaction with the machine's state in it. It is answered when its moment has passed, or, if
    /// its job has no id, when all is written; or when it fails.
    pub(in crate::control) fn machine_transaction(
        &mut self,
        arguments: TransactionArguments,
        about: About,
        reply: qmp::Reply,
    ) {
        if let Err(error) = self.check_no_migration() {
            return reply.send(Err(error));
        }
        let given = arguments.actions.iter().find_map(|action| match action {
            TransactionAction::VmstateSave(arguments) => arguments.job_id.clone(),
            _ => None,
        });
        let (id, hidden) = match given {
            Some(id) => (id, false),
            None => (HIDDEN.to_owned(), true),
        };
        if let Err(error) = self.check_no_snapshot_job() {
            return reply.send(Err(error));
        }
        let handle = Handle::new(self.jobs.list.clone(), id.clone(), Some(reply));
        let auto = AutoFlags { finalize: true, dismiss: hidden };
        let new = NewJob { auto, hidden, ..NewJob::new(&id, JobType::SnapshotSave) };
        if let Err(error) = self.jobs.list.lock().create(new, Box::new(handle.clone())) {
            if let Some(reply) = handle.take_answer() {
                reply.send(Err(error));
            }
            return;
        }
        let task = Task::Transaction(arguments, about);
        self.jobs.waiting.push_back(Waiting { id, work: Queued::Task(task), handle });
        self.start_next_job();
    }

    /// The moment of the current job's transaction has passed.
    pub(super) fn transaction_passed(&self) {
        let reply = self.jobs.current.as_ref().and_then(|current| current.handle.take_answer());
        if let Some(reply) = reply {
            reply.send(Ok(serde_json::json!({})));
        }
    }
}
