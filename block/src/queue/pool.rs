//! The threads that block on the disk so that the owners of queues need not.
//!
//! Two sets, so that nobody waits for what is queued behind itself: *requests* may wait for gates,
//! ranges and locks; *transfers* wait for the kernel and the metadata lock alone, and are what
//! requests, and who closes a gate, may be waiting for.
//! Threads start when there is work for them and end after a while without any.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Threads of one set at most. As many requests of all queues together can wait at once.
const MAX_THREADS: usize = 32;
/// How long a thread stays without work.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// A set of threads.
pub(super) struct Pool {
    name: &'static str,
    state: Mutex<State>,
    work: Condvar,
}

/// What may wait for gates, ranges and locks.
pub(super) static REQUESTS: Pool = Pool::new("block-request");
/// What waits for the kernel and the metadata lock alone.
pub(super) static TRANSFERS: Pool = Pool::new("block-transfer");

impl Pool {
    const fn new(name: &'static str) -> Self {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0 };
        Self { name, state: Mutex::new(state), work: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a job done by some thread; jobs are begun in order. Each queue bounds how many it has here.
    /// Without any thread, which only a host out of resources leads to, the caller does it.
    pub(super) fn run(&'static self, job: Job) {
        let mut state = self.state();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            drop(state);
            self.work.notify_one();
            return;
        }
        if state.threads < MAX_THREADS && self.start_thread() {
            state.threads += 1;
        } else if state.threads == 0 {
            let job = state.jobs.pop_back();
            drop(state);
            if let Some(job) = job {
                job();
            }
        }
    }

    fn start_thread(&'static self) -> bool {
        let thread = std::thread::Builder::new().name(self.name.to_owned());
        match thread.spawn(move || self.serve()) {
            Ok(_) => true,
            Err(e) => {
                tracing::warn!("no thread for disk requests: {e}");
                false
            }
        }
    }

    fn serve(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // Its own code sees to its request; here a thread that others count on must not end.
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a job of {} threads panicked", self.name);
                }
                state = self.state();
                continue;
            }
            state.idle += 1;
            let (woken, time) =
                self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if time.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn jobs_run_beside_each_other_up_to_the_limit_and_the_rest_after_them() {
        static POOL: Pool = Pool::new("test");
        let (done, dones) = channel();
        let gates: Vec<_> = (0..MAX_THREADS + 5)
            .map(|n| {
                let (open, opened) = channel::<()>();
                let done = done.clone();
                POOL.run(Box::new(move || {
                    let _ = opened.recv();
                    done.send(n).unwrap();
                }));
                open
            })
            .collect();
        // The last of those that run goes first: they do not wait for each other.
        for open in gates[..MAX_THREADS].iter().rev().chain(&gates[MAX_THREADS..]) {
            open.send(()).unwrap();
            dones.recv().unwrap();
        }
        assert!(dones.try_recv().is_err());
        assert!(POOL.state().threads <= MAX_THREADS);
    }

    #[test]
    fn a_thread_goes_on_after_a_job_that_panicked() {
        static POOL: Pool = Pool::new("test");
        for _ in 0..MAX_THREADS + 5 {
            POOL.run(Box::new(|| panic!("a fault")));
        }
        let (done, dones) = channel();
        POOL.run(Box::new(move || done.send(()).unwrap()));
        dones.recv().unwrap();
    }
}
