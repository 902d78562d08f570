//! Many independent pieces of work on a few threads.

use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use block::Progress;

/// More threads than this only wait for each other.
const MAX_THREADS: usize = 16;

/// Runs `work` on each item, in about the order given, on up to `threads` threads counting the
/// calling one. The first error ends it, and so does a cancel, which is looked for before each item.
pub(crate) fn for_each<T: Sync>(
    items: &[T],
    threads: usize,
    progress: &Progress,
    work: impl Fn(&T) -> block::Result<()> + Sync,
) -> block::Result<()> {
    let cursor = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let worker = || {
        while let Some(item) = items.get(cursor.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = progress.check().and_then(|()| work(item)) {
                // The others find the list at its end.
                cursor.store(items.len(), Ordering::Relaxed);
                let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
                failure.get_or_insert(error);
            }
        }
    };
    let helpers = threads.clamp(1, MAX_THREADS).min(items.len().max(1)) - 1;
    thread::scope(|scope| {
        let handles: Vec<_> = (0..helpers)
            .map_while(|n| {
                let name = format!("checkpoint-{n}");
                // Where the host has no thread to spare, those there are do the work.
                thread::Builder::new().name(name).spawn_scoped(scope, worker).ok()
            })
            .collect();
        worker();
        for handle in handles {
            if let Err(panic) = handle.join() {
                resume_unwind(panic);
            }
        }
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once() {
        let done: Vec<_> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        let items: Vec<usize> = (0..1000).collect();
        for_each(&items, 4, &Progress::default(), |&at| {
            done[at].fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();
        assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn an_error_ends_the_work_and_is_returned() {
        let count = AtomicUsize::new(0);
        let items: Vec<usize> = (0..100_000).collect();
        let result = for_each(&items, 2, &Progress::default(), |&at| {
            count.fetch_add(1, Ordering::Relaxed);
            if at == 10 {
                return Err(block::Error::NotSupported("ten".to_owned()));
            }
            Ok(())
        });
        assert_eq!(result.unwrap_err().to_string(), "ten");
        assert!(count.load(Ordering::Relaxed) < items.len());
    }

    #[test]
    fn a_cancel_does_no_more_items() {
        let progress = Progress::default();
        let count = AtomicUsize::new(0);
        let result = for_each(&[0; 100], 1, &progress, |_| {
            count.fetch_add(1, Ordering::Relaxed);
            progress.cancel();
            Ok(())
        });
        assert!(matches!(result, Err(block::Error::Cancelled)));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
