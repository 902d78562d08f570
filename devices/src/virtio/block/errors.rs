//! Requests that fail on the host: what the user wants done about them, and what becomes of the disk.
//! See `docs/devices.md`.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What to do about requests that fail on the host. As `rerror` and `werror` of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The guest is told that all went well.
    Ignore,
    /// The machine stops, and the request is done again when it goes on.
    Stop,
    /// [`Self::Stop`] where the host is out of space, else [`Self::Report`].
    Enospc,
}

impl OnError {
    fn action(self, no_space: bool) -> ErrorAction {
        match self {
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
            Self::Enospc if no_space => ErrorAction::Stop,
            Self::Report | Self::Enospc => ErrorAction::Report,
        }
    }

    /// As it is written on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }
}

impl fmt::Display for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that says no [`OnError`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not report, ignore, stop, enospc or auto")]
pub struct UnknownOnError(String);

impl FromStr for OnError {
    type Err = UnknownOnError;

    fn from_str(text: &str) -> Result<Self, UnknownOnError> {
        let all = [Self::Report, Self::Ignore, Self::Stop, Self::Enospc];
        let found = all.into_iter().find(|policy| policy.as_str() == text);
        found.ok_or_else(|| UnknownOnError(text.to_owned()))
    }
}

/// What to do about failed requests of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// About reads: `rerror`.
    pub read: OnError,
    /// About all others: `werror`.
    pub write: OnError,
}

impl Default for ErrorPolicy {
    /// QEMU's `auto`.
    fn default() -> Self {
        Self { read: OnError::Report, write: OnError::Enospc }
    }
}

impl ErrorPolicy {
    /// Whether the disk has an [`IoStatus`] to show: QEMU's rule, which knows no `rerror=enospc`.
    pub fn shows_status(self) -> bool {
        self.read == OnError::Stop || matches!(self.write, OnError::Stop | OnError::Enospc)
    }
}

/// What is done about one failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest is told.
    Report,
    /// The guest is told that all went well.
    Ignore,
    /// The machine is to stop, and the request waits.
    Stop,
}

/// A request that failed on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Whether it was anything but a read.
    pub write: bool,
    /// What is done about it.
    pub action: ErrorAction,
    /// Whether the host is out of space.
    pub no_space: bool,
    /// The host's words.
    pub reason: String,
    /// The round in which it failed: if there is a later one ([`IoErrors::round`]), the request is tried
    /// again already.
    pub round: u64,
}

/// Who hears of failures. Called on the disk's thread, which goes on when it returns.
pub type FailureSink = Box<dyn Fn(Failure) + Send + Sync>;

/// What stopped the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum IoStatus {
    /// Nothing.
    Ok,
    /// A request failed.
    Failed,
    /// A request found no space.
    NoSpace,
}

/// Failures of a disk. Shared by its thread and the machine.
pub struct IoErrors {
    policy: ErrorPolicy,
    status: AtomicU8,
    /// The machine's, and that of the disk's thread, which follows.
    round: AtomicU64,
    seen: AtomicU64,
    sink: FailureSink,
}

impl fmt::Debug for IoErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoErrors").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl IoErrors {
    /// Nothing has failed.
    pub fn new(policy: ErrorPolicy, sink: FailureSink) -> Self {
        let status = AtomicU8::new(IoStatus::Ok as u8);
        Self { policy, status, round: AtomicU64::new(0), seen: AtomicU64::new(0), sink }
    }

    /// What the user wants.
    pub fn policy(&self) -> ErrorPolicy {
        self.policy
    }

    /// What failed first since the machine was resumed, of requests that stop it.
    pub fn status(&self) -> IoStatus {
        match self.status.load(Ordering::Acquire) {
            1 => IoStatus::Failed,
            2 => IoStatus::NoSpace,
            _ => IoStatus::Ok,
        }
    }

    /// The machine is about to resume the disk: what waits is tried again, and what failed before stops
    /// it no more.
    pub fn begin_round(&self) {
        self.status.store(IoStatus::Ok as u8, Ordering::Release);
        self.round.fetch_add(1, Ordering::AcqRel);
    }

    /// The disk's thread was resumed, and tries again what waits.
    pub(super) fn follow(&self) {
        self.seen.store(self.round(), Ordering::Release);
    }

    /// How often the machine was resumed.
    pub fn round(&self) -> u64 {
        self.round.load(Ordering::Acquire)
    }

    /// A request has failed: decides what is done, and tells.
    pub(super) fn failed(&self, write: bool, error: &::block::Error) -> ErrorAction {
        let errno = error.errno();
        let no_space = errno == libc::ENOSPC;
        let policy = if write { self.policy.write } else { self.policy.read };
        let action = policy.action(no_space);
        if action == ErrorAction::Stop {
            let status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            // The first one stays. An error means that there was one.
            let _ = self.status.compare_exchange(
                IoStatus::Ok as u8,
                status as u8,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
        }
        let reason = ::block::host_words(&std::io::Error::from_raw_os_error(errno));
        let round = self.seen.load(Ordering::Acquire);
        (self.sink)(Failure { write, action, no_space, reason, round });
        action
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn failing(errno: i32) -> ::block::Error {
        ::block::Error::Io {
            operation: "write",
            filename: "f".into(),
            offset: 0,
            source: std::io::Error::from_raw_os_error(errno),
        }
    }

    fn errors(read: OnError, write: OnError) -> (IoErrors, Arc<Mutex<Vec<Failure>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&told);
        let sink = Box::new(move |failure| sink.lock().unwrap().push(failure));
        (IoErrors::new(ErrorPolicy { read, write }, sink), told)
    }

    #[test]
    fn each_policy_does_what_it_says() {
        use ErrorAction::{Ignore, Report, Stop};
        for (policy, eio, enospc) in [
            (OnError::Report, Report, Report),
            (OnError::Ignore, Ignore, Ignore),
            (OnError::Stop, Stop, Stop),
            (OnError::Enospc, Report, Stop),
        ] {
            assert_eq!(policy.as_str().parse(), Ok(policy));
            for write in [false, true] {
                let (errors, told) = match write {
                    true => errors(OnError::Report, policy),
                    false => errors(policy, OnError::Report),
                };
                assert_eq!(errors.failed(write, &failing(libc::EIO)), eio);
                assert_eq!(errors.failed(write, &failing(libc::ENOSPC)), enospc);
                let told = told.lock().unwrap();
                assert_eq!((told[0].action, told[1].action), (eio, enospc));
                assert_eq!((told[0].no_space, told[1].no_space), (false, true));
                assert!(told.iter().all(|failure| failure.write == write));
                assert_eq!(told[0].reason, "Input/output error");
                assert_eq!(told[1].reason, "No space left on device");
            }
        }
        assert!("auto".parse::<OnError>().is_err());
    }

    #[test]
    fn the_first_failure_that_stops_is_the_status_until_the_next_round() {
        let (errors, told) = errors(OnError::Report, OnError::Stop);
        errors.failed(false, &failing(libc::EIO));
        assert_eq!(errors.status(), IoStatus::Ok);
        errors.failed(true, &failing(libc::ENOSPC));
        errors.failed(true, &failing(libc::EIO));
        assert_eq!(errors.status(), IoStatus::NoSpace);
        errors.begin_round();
        assert_eq!(errors.status(), IoStatus::Ok);
        errors.failed(true, &failing(libc::EIO));
        assert_eq!(errors.status(), IoStatus::Failed);
        errors.follow();
        errors.failed(true, &failing(libc::EIO));
        let rounds: Vec<u64> = told.lock().unwrap().iter().map(|failure| failure.round).collect();
        assert_eq!(rounds, [0, 0, 0, 0, 1]);
    }

    #[test]
    fn a_status_is_shown_where_something_can_set_it() {
        use OnError::{Enospc, Ignore, Report, Stop};
        for (read, write, shown) in [
            (Report, Enospc, true),
            (Report, Stop, true),
            (Stop, Report, true),
            (Report, Report, false),
            (Ignore, Ignore, false),
            (Enospc, Report, false),
        ] {
            assert_eq!(ErrorPolicy { read, write }.shows_status(), shown, "{read} {write}");
        }
    }
}
