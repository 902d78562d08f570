//! Threads that write to parts of their own while another flushes: the log is as they met, so a
//! workload is not the same twice.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Node, WriteBuf};

use crate::common::Random;
use crate::record::Host;
use crate::timeline::{Event, What};

const WRITES: usize = 5;
const FLUSHES: usize = 3;

/// What a thread did: when by the log, and in which order by a clock that all threads share.
struct Done {
    log: Range<usize>,
    clock: Range<u64>,
    write: Option<(usize, Vec<u8>)>,
}

/// Runs the threads on a disk that holds `disk`; gives the events in an order that a timeline takes.
pub(crate) fn run(node: &Node, host: &Host, disk: &mut [u8], seed: u64) -> Vec<Event> {
    let clock = AtomicU64::new(0);
    let half = disk.len() / 2 / 512 * 512;
    let timed = |act: &dyn Fn(), write| {
        let (from, begun) = (host.now(), clock.fetch_add(1, Ordering::SeqCst));
        act();
        let ended = clock.fetch_add(1, Ordering::SeqCst);
        Done { log: from..host.now(), clock: begun..ended, write }
    };
    let writer = |part: Range<usize>, seed: u64| {
        let mut random = Random(seed | 1);
        let mut done = Vec::new();
        for _ in 0..WRITES {
            let at = part.start + random.below((part.len() - 512) as u64) as usize / 512 * 512;
            let len = 512 * (1 + random.below(80) as usize).min((part.end - at) / 512).max(1);
            let bytes = random.bytes(len as u64);
            let act = || node.write(at as u64, &[WriteBuf::new(&bytes)]).unwrap();
            done.push(timed(&act, Some((at, bytes.clone()))));
        }
        done
    };
    let flusher = || {
        let flush = || node.flush().unwrap();
        (0..FLUSHES).map(|_| timed(&flush, None)).collect::<Vec<_>>()
    };
    let mut done: Vec<Done> = std::thread::scope(|scope| {
        let low = scope.spawn(|| writer(0..half, seed));
        let high = scope.spawn(|| writer(half..disk.len(), seed ^ 0x5555));
        let flushes = scope.spawn(flusher);
        [low, high, flushes].into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    // A flush stands before all that had not returned when it began.
    let mut events = Vec::new();
    done.sort_by_key(|done| match done.write {
        Some(_) => done.clock.end,
        None => done.clock.start,
    });
    for Done { log, write, .. } in done {
        let what = match write {
            Some((at, bytes)) => {
                disk[at..at + bytes.len()].copy_from_slice(&bytes);
                What::Changed { at, bytes }
            }
            None => What::Flushed { disk: Arc::new(disk.to_vec()) },
        };
        events.push(Event { start: log.start, end: log.end, what });
    }
    events
}
