//! Processes that the kernel refuses something, as on hosts that are locked down.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
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

/// What [`listen`] is asked about: all calls by which files are read, written and flushed, apart from io_uring.
const FILE_CALLS: [libc::c_long; 12] = [
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
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

/// Has the file calls of this process, and of those it becomes, wait for an answer of whoever reads the
/// descriptor. For a child between fork and exec: nothing is allocated and no lock taken.
///
/// # Errors
/// The kernel's.
pub fn listen() -> io::Result<OwnedFd> {
    let mut filter = ask_about_file_calls();
    let program = program_of(&mut filter);
    no_new_privileges()?;
    // A signal does not end the wait once the call is known to the other side, or it would come twice.
    let flags =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let (call, mode) = (libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER);
    // SAFETY: `program` and the instructions it points to live until the call is over.
    let fd = unsafe { libc::syscall(call, mode, flags, &raw const program) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers of calls are small"
)]
fn ask_about_file_calls() -> [libc::sock_filter; 2 * FILE_CALLS.len() + 2] {
    let mut filter = [ret(libc::SECCOMP_RET_ALLOW); 2 * FILE_CALLS.len() + 2];
    filter[0] = load(NUMBER);
    for (at, call) in FILE_CALLS.iter().enumerate() {
        filter[2 * at + 1] = unless_equal_skip(*call as u32, 1);
        filter[2 * at + 2] = ret(libc::SECCOMP_RET_USER_NOTIF);
    }
    filter
}

fn program_of(filter: &mut [libc::sock_filter]) -> libc::sock_fprog {
    #[allow(clippy::cast_possible_truncation, reason = "programs have a few instructions")]
    libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() }
}

/// Without which only root may put a filter in force.
fn no_new_privileges() -> io::Result<()> {
    // SAFETY: this call takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts a program in force for this process and those it becomes.
fn install<const N: usize>(mut filter: [libc::sock_filter; N]) -> io::Result<()> {
    let program = program_of(&mut filter);
    no_new_privileges()?;
    // SAFETY: `program` and the instructions it points to live until the call is over.
    let set =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
