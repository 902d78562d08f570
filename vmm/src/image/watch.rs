//! Progress on a terminal, of anything that takes longer than a second.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use block::Progress;

use super::text::size;

/// How long nothing is shown, and between two lines.
const QUIET: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_millis(200);

/// Runs something that takes a while; shows how far it is if `quiet` is not asked for and there is a
/// terminal to show it on.
pub(super) fn watched<T: Send>(quiet: bool, work: impl FnOnce(&Progress) -> T + Send) -> T {
    let progress = Progress::default();
    if quiet || !std::io::stderr().is_terminal() {
        return work(&progress);
    }
    std::thread::scope(|scope| {
        let (done, ended) = mpsc::channel::<()>();
        let progress = &progress;
        scope.spawn(move || {
            let started = Instant::now();
            let mut shown = false;
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if started.elapsed() > QUIET {
                    let (current, total) = progress.get();
                    let percent = current.min(total) * 100 / total.max(1);
                    eprint!("\r{percent:3} %  {} of {}   ", size(current), size(total));
                    let _ = std::io::stderr().flush();
                    shown = true;
                }
            }
            if shown {
                eprintln!();
            }
        });
        let result = work(progress);
        drop(done);
        result
    })
}
