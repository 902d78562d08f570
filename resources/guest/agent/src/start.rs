//! Where the kernel enters the program.

use core::arch::global_asm;
use core::ffi::CStr;

use crate::sys;

// At entry the stack holds argc, argv[0..argc], NULL, the environment; see the System V ABI,
// section 3.4.1. A call needs the stack aligned to 16 bytes.
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {start}",
    "ud2",
    start = sym start,
);

extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: the kernel put the argument count at the top of the stack.
    let argc = unsafe { *stack };
    let mut shell = false;
    for index in 1..argc {
        // SAFETY: argv[1..argc] follow the count and are NUL-terminated strings.
        let argument = unsafe { CStr::from_ptr(*stack.add(1 + index) as *const _) };
        shell |= argument.to_bytes() == b"shell";
    }
    // Started by hand, from a shell: there is one agent, and it is init.
    if sys::getpid() != 1 {
        crate::console::print("agent: runs as process 1 only\n");
        sys::exit(1);
    }
    crate::run(shell)
}
