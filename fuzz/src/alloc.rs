//! An allocator that ends the process when a single request, or all of them together, take more
//! memory than the input at hand can justify. It finds sizes that were believed because a header
//! claims them, under libFuzzer and in plain tests alike.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most bytes of one allocation.
static SINGLE: AtomicUsize = AtomicUsize::new(usize::MAX);
/// Most bytes allocated at a time.
static TOTAL: AtomicUsize = AtomicUsize::new(usize::MAX);
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// The allocator; see the module.
pub struct Limited;

/// Held while there are limits.
static LIMITED: Mutex<()> = Mutex::new(());

/// Limits that end with this value. They are the whole process's, so a second waits for the first.
pub struct Limit {
    _held: MutexGuard<'static, ()>,
}

impl Limit {
    /// From now on one allocation has at most `single` bytes, and all that come on top of what is
    /// there have at most `more`.
    #[must_use]
    pub fn set(single: usize, more: usize) -> Self {
        let held = LIMITED.lock().unwrap_or_else(PoisonError::into_inner);
        SINGLE.store(single, Ordering::Relaxed);
        TOTAL.store(LIVE.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        Self { _held: held }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        SINGLE.store(usize::MAX, Ordering::Relaxed);
        TOTAL.store(usize::MAX, Ordering::Relaxed);
    }
}

fn count(size: usize) {
    let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
    if size > SINGLE.load(Ordering::Relaxed) || live > TOTAL.load(Ordering::Relaxed) {
        SINGLE.store(usize::MAX, Ordering::Relaxed);
        TOTAL.store(usize::MAX, Ordering::Relaxed);
        let trace = std::backtrace::Backtrace::force_capture();
        eprintln!(
            "allocation of {size} bytes, {live} in all, is more than the input justifies\n{trace}"
        );
        std::process::abort();
    }
}

// SAFETY: everything is passed on to the system's allocator as it came; only sizes are counted.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
