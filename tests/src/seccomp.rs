//! Processes that the kernel refuses something, as on hosts that are locked down.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `AUDIT_ARCH_X86_64` is not looked at: the number is that of io_uring_setup on every architecture.
const PROGRAM: [libc::sock_filter; 4] = [
    // The number of the system call, the first word of seccomp_data.
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, IO_URING_SETUP),
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | EPERM),
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
];

const IO_URING_SETUP: u32 = 425;
const EPERM: u32 = 1;

#[allow(clippy::cast_possible_truncation, reason = "codes of instructions are 16 bits")]
const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// `io_uring_setup` fails with EPERM in what the command runs.
pub fn refuse_io_uring(command: &mut Command) {
    // SAFETY: between fork and exec the function only makes system calls: it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(install) };
}

/// Puts the program in force for this process and those it becomes.
fn install() -> io::Result<()> {
    let mut filter = PROGRAM;
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: this call takes numbers only.
    let no_new = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if no_new != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `program` and the instructions it points to live until the call is over.
    let set =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
