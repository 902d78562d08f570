//! Finding pages of zeroes.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::{PAGE, index};

const WORDS: usize = index(PAGE) / size_of::<u64>();

/// Words looked at between two decisions: a cache line.
const LINE: usize = 8;

/// Whether the guest page at `page` holds only zeroes.
///
/// # Safety
/// `page` must be aligned to 4096 bytes and the 4096 bytes there must be mapped. Others may write
/// them at the same time; the answer is then that of some moment.
pub(crate) unsafe fn page_is_zero(page: *const u8) -> bool {
    // SAFETY: the caller vouches for the page. Memory that a guest can write may be looked at
    // through atomics, and relaxed loads are plain loads to the processor.
    let words = unsafe { &*page.cast::<[AtomicU64; WORDS]>() };
    let (lines, _) = words.as_chunks::<LINE>();
    lines.iter().all(|line| {
        let bits = line.iter().map(|word| word.load(Ordering::Relaxed));
        bits.fold(0, |all, bits| all | bits) == 0
    })
}
