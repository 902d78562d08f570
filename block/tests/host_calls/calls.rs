//! The system calls of file storage, as this program has them: what is defined here comes before what the C
//! library has of the same name. Those of one thread can be made to fail, or to move less than asked.
//!
//! Calls that go to the kernel without the C library (`lseek`, io_uring) are not seen.

use std::cell::RefCell;

use libc::{c_char, c_int, c_long, c_uint, iovec, mode_t, off_t, ssize_t};

/// What is called, as far as it matters to what may come of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Open,
    /// Of the second descriptor, past the page cache: files are used without it too.
    OpenDirect,
    Stat,
    Read,
    /// Of what is in the page cache: where it fails the disk is asked.
    ReadCached,
    Write,
    Flush,
    Allocate,
    Truncate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It fails with this number. ENOSPC is met by calls that take space.
    Errno(c_int),
    /// A part of the transfer is made.
    Short,
}

/// What is to happen to the call of this number, counted from 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) at: u32,
    pub(crate) kind: Kind,
    /// To all later ones too.
    pub(crate) lasting: bool,
}

struct Plan {
    fault: Fault,
    calls: u32,
    hits: Vec<Call>,
}

thread_local! {
    static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
}

/// Acts with a fault in the calls of this thread; gives the calls that it met.
pub(crate) fn with_fault<T>(fault: Fault, act: impl FnOnce() -> T) -> (T, Vec<Call>) {
    PLAN.set(Some(Plan { fault, calls: 0, hits: Vec::new() }));
    let result = act();
    (result, PLAN.take().unwrap().hits)
}

/// What becomes of a call: `None` if it is to be made as it is.
fn met(call: Call) -> Option<Kind> {
    PLAN.with_borrow_mut(|plan| {
        let plan = plan.as_mut()?;
        let concerned = match plan.fault.kind {
            Kind::Errno(libc::ENOSPC) => matches!(call, Call::Write | Call::Allocate),
            Kind::Errno(_) => true,
            Kind::Short => matches!(call, Call::Read | Call::ReadCached | Call::Write),
        };
        if !concerned {
            return None;
        }
        let number = plan.calls;
        plan.calls += 1;
        let hit = number == plan.fault.at || (plan.fault.lasting && number > plan.fault.at);
        hit.then(|| {
            plan.hits.push(call);
            plan.fault.kind
        })
    })
}

fn fail(errno: c_int) -> c_long {
    // SAFETY: it has no conditions.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: it is this thread's own.
    unsafe { *place = errno };
    -1
}

/// Makes a call of no transfer, unless it is to fail.
fn plain(call: Call, make: impl FnOnce() -> c_long) -> c_int {
    let result = match met(call) {
        Some(Kind::Errno(errno)) => fail(errno),
        _ => make(),
    };
    c_int::try_from(result).unwrap()
}

/// Makes a transfer: with half of the first buffer where it is to be short.
///
/// # Safety
/// The list is one of `count` buffers, as `make` wants it.
unsafe fn transfer(
    call: Call,
    list: *const iovec,
    count: c_int,
    make: impl FnOnce(*const iovec, c_int) -> c_long,
) -> ssize_t {
    let result = match met(call) {
        Some(Kind::Errno(errno)) => fail(errno),
        Some(Kind::Short) if count > 0 => {
            // SAFETY: there is a first buffer, as the caller promised.
            let first = unsafe { *list };
            let part = iovec { iov_base: first.iov_base, iov_len: first.iov_len.div_ceil(2) };
            make(&raw const part, 1)
        }
        _ => make(list, count),
    };
    ssize_t::try_from(result).unwrap()
}

// Each passes its arguments on to the kernel; its caller promises what the kernel asks for.

#[unsafe(no_mangle)]
unsafe extern "C" fn preadv(fd: c_int, list: *const iovec, count: c_int, at: off_t) -> ssize_t {
    // SAFETY: see above.
    let make = |list: *const iovec, count: c_int| unsafe {
        libc::syscall(libc::SYS_preadv, fd, list, count, at, 0_i64)
    };
    // SAFETY: see above.
    unsafe { transfer(Call::Read, list, count, make) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn preadv2(
    fd: c_int,
    list: *const iovec,
    count: c_int,
    at: off_t,
    flags: c_int,
) -> ssize_t {
    let make =
        // SAFETY: see above.
        |list: *const iovec, count: c_int| unsafe { libc::syscall(libc::SYS_preadv2, fd, list, count, at, 0_i64, flags) };
    // SAFETY: see above.
    unsafe { transfer(Call::ReadCached, list, count, make) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pwritev(fd: c_int, list: *const iovec, count: c_int, at: off_t) -> ssize_t {
    // SAFETY: see above.
    let make = |list: *const iovec, count: c_int| unsafe {
        libc::syscall(libc::SYS_pwritev, fd, list, count, at, 0_i64)
    };
    // SAFETY: see above.
    unsafe { transfer(Call::Write, list, count, make) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let call = if flags & libc::O_DIRECT == 0 { Call::Open } else { Call::OpenDirect };
    plain(call, || {
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn statx(
    fd: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    buf: *mut libc::statx,
) -> c_int {
    // SAFETY: see above.
    let make = || unsafe { libc::syscall(libc::SYS_statx, fd, path, flags, mask, buf) };
    // Names are looked at for loops in chains only, and by the standard library to see if the call is there.
    let of_open_file = flags & libc::AT_EMPTY_PATH != 0 && !buf.is_null();
    if of_open_file { plain(Call::Stat, make) } else { c_int::try_from(make()).unwrap() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    // SAFETY: see above.
    plain(Call::Flush, || unsafe { libc::syscall(libc::SYS_fdatasync, fd) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, at: off_t, len: off_t) -> c_int {
    // SAFETY: see above.
    plain(Call::Allocate, || unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, at, len) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate64(fd: c_int, len: off_t) -> c_int {
    // SAFETY: see above.
    plain(Call::Truncate, || unsafe { libc::syscall(libc::SYS_ftruncate, fd, len) })
}
