//! Processes that the kernel refuses something, as on hosts that are locked down.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `AUDIT_ARCH_X86_64` is not looked at: the number is that of io_uring_setup on every architecture.
const NO_IO_URING: [libc::sock_filter; 4] = [
    load(NUMBER),
    unless_equal_skip(IO_URING_SETUP, 1),
    ret(libc::SECCOMP_RET_ERRNO | EPERM),
    ret(libc::SECCOMP_RET_ALLOW),
];

/// The system call and what `/dev/userfaultfd` offers instead; the numbers are those of x86-64.
const NO_USERFAULTFD: [libc::sock_filter; 8] = [
    load(NUMBER),
    unless_equal_skip(USERFAULTFD, 1),
    ret(libc::SECCOMP_RET_ERRNO | EPERM),
    unless_equal_skip(IOCTL, 3),
    load(SECOND_ARGUMENT),
    unless_equal_skip(USERFAULTFD_IOC_NEW, 1),
    ret(libc::SECCOMP_RET_ERRNO | EPERM),
    ret(libc::SECCOMP_RET_ALLOW),
];

/// Where the number of the system call is in seccomp_data, and its second argument's low half.
const NUMBER: u32 = 0;
const SECOND_ARGUMENT: u32 = 24;
const IO_URING_SETUP: u32 = 425;
const USERFAULTFD: u32 = 323;
const IOCTL: u32 = 16;
const USERFAULTFD_IOC_NEW: u32 = 0xaa00;
const EPERM: u32 = 1;

const fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

const fn unless_equal_skip(value: u32, skip: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value)
}

const fn ret(what: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, what)
}

#[allow(clippy::cast_possible_truncation, reason = "codes of instructions are 16 bits")]
const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// `io_uring_setup` fails with EPERM in what the command runs.
pub fn refuse_io_uring(command: &mut Command) {
    // SAFETY: between fork and exec the function only makes system calls: it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(|| install(NO_IO_URING)) };
}

/// `userfaultfd`, and a descriptor of `/dev/userfaultfd`, are refused with EPERM in what the command runs.
pub fn refuse_userfaultfd(command: &mut Command) {
    // SAFETY: as above.
    unsafe { command.pre_exec(|| install(NO_USERFAULTFD)) };
}

/// Puts a program in force for this process and those it becomes.
fn install<const N: usize>(mut filter: [libc::sock_filter; N]) -> io::Result<()> {
    #[allow(clippy::cast_possible_truncation, reason = "programs have a few instructions")]
    let program = libc::sock_fprog { len: N as u16, filter: filter.as_mut_ptr() };
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
