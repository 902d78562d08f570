//! The states of a job, and what may happen in each.

use crate::schema::{JobStatus, JobVerb};

/// Whether a job may go from one state to the other.
pub(crate) fn may_become(from: JobStatus, to: JobStatus) -> bool {
    use JobStatus as S;
    let successors: &[JobStatus] = match from {
        S::Undefined => &[S::Created],
        S::Created => &[S::Running, S::Aborting, S::Null],
        S::Running => &[S::Paused, S::Ready, S::Waiting, S::Aborting],
        S::Paused => &[S::Running],
        S::Ready => &[S::Standby, S::Waiting, S::Aborting],
        S::Standby => &[S::Ready],
        S::Waiting => &[S::Pending, S::Aborting],
        S::Pending => &[S::Aborting, S::Concluded],
        // To itself: each job of a failing transaction may be told to abort more than once.
        S::Aborting => &[S::Aborting, S::Concluded],
        S::Concluded => &[S::Null],
        S::Null => &[],
    };
    successors.contains(&to)
}

/// Whether a job in this state accepts the verb.
pub(crate) fn accepts(status: JobStatus, verb: JobVerb) -> bool {
    use JobStatus as S;
    match verb {
        JobVerb::Cancel => matches!(
            status,
            S::Created | S::Running | S::Paused | S::Ready | S::Standby | S::Waiting | S::Pending
        ),
        JobVerb::Pause | JobVerb::Resume | JobVerb::SetSpeed | JobVerb::Change => {
            matches!(status, S::Created | S::Running | S::Paused | S::Ready | S::Standby)
        }
        // Standby too: it takes effect when the job goes on.
        JobVerb::Complete => matches!(status, S::Ready | S::Standby),
        JobVerb::Finalize => status == S::Pending,
        JobVerb::Dismiss => status == S::Concluded,
    }
}
