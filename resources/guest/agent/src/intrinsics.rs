//! The memory functions the compiler calls and a C library would have brought. String
//! instructions: small, and fast on every CPU of this century.

use core::arch::asm;

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") length => _, inout("rdi") to => _,
             inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= length {
        // SAFETY: a forward copy is right unless `to` lies inside the source.
        return unsafe { memcpy(to, from, length) };
    }
    // SAFETY: the caller vouches for both ranges, `length` is not 0 here, and the direction flag
    // is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") length => _,
             inout("rdi") to.add(length - 1) => _, inout("rsi") from.add(length - 1) => _,
             options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") length => _, inout("rdi") to => _,
             in("al") value as u8, options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
    for index in 0..length {
        // SAFETY: the caller vouches for both ranges. Volatile, so that the compiler does not
        // turn the loop into a call of this very function.
        let (x, y) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, length) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller vouches for a NUL-terminated string; volatile as in `memcmp`.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
