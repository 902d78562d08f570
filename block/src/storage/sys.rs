//! The system calls of file storage. All `unsafe` of file I/O is here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::num::{to_u64, to_usize};
use crate::{ReadBuf, WriteBuf};

/// Most buffers the kernel takes in one call (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

fn off(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn count(n: usize) -> libc::c_int {
    libc::c_int::try_from(n.min(MAX_IOVECS)).unwrap_or(libc::c_int::MAX)
}

/// The result of a call that gives a byte count or -1.
fn bytes(ret: libc::ssize_t) -> io::Result<u64> {
    usize::try_from(ret).map(to_u64).map_err(|_| io::Error::last_os_error())
}

fn ok(ret: libc::c_int) -> io::Result<()> {
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the process have as many files open as it may; gives their number. A chain of backing files takes
/// two descriptors an image, and the usual limit of 1024 is there for programs that use select(2).
///
/// # Errors
/// The system's; the limit is as it was then.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a limit that lives longer than the call.
    ok(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above.
        ok(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    }
    Ok(limit.rlim_cur)
}

/// Calls again as long as a signal came first.
pub(super) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// preadv(2); may read less than asked.
pub(super) fn preadv(fd: BorrowedFd<'_>, bufs: &[ReadBuf<'_>], offset: u64) -> io::Result<u64> {
    let offset = off(offset)?;
    // SAFETY: ReadBuf is repr(transparent) over iovec, and whoever made it vouched that the memory
    // is writable as long as the buffer lives, which is longer than this call.
    bytes(unsafe { libc::preadv(fd.as_raw_fd(), bufs.as_ptr().cast(), count(bufs.len()), offset) })
}

/// preadv2(2) of what is in the page cache: EAGAIN where the disk would have to be asked.
pub(crate) fn preadv_cached(
    fd: BorrowedFd<'_>,
    bufs: &[ReadBuf<'_>],
    offset: u64,
) -> io::Result<u64> {
    let offset = off(offset)?;
    let (list, count, fd) = (bufs.as_ptr().cast(), count(bufs.len()), fd.as_raw_fd());
    // SAFETY: as in `preadv`.
    bytes(unsafe { libc::preadv2(fd, list, count, offset, libc::RWF_NOWAIT) })
}

/// pwritev(2); may write less than asked.
pub(crate) fn pwritev(fd: BorrowedFd<'_>, bufs: &[WriteBuf<'_>], offset: u64) -> io::Result<u64> {
    let offset = off(offset)?;
    // SAFETY: as in `preadv`, for readable memory.
    bytes(unsafe { libc::pwritev(fd.as_raw_fd(), bufs.as_ptr().cast(), count(bufs.len()), offset) })
}

/// Takes O_NONBLOCK, with which files are opened for the sake of what is no file, off again:
/// io_uring would give EAGAIN where it should wait.
pub(super) fn set_blocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is passed.
    ok(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })
}

/// What `fallocate` shall do with a range.
#[derive(Clone, Copy)]
pub(super) enum Allocate {
    /// Take space, growing the file.
    Reserve,
    /// Give space back; the range reads as zeroes. The length stays.
    PunchHole,
    /// Make the range read as zeroes. The length stays.
    Zero,
}

/// fallocate(2).
pub(super) fn fallocate(
    fd: BorrowedFd<'_>,
    what: Allocate,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let mode = match what {
        Allocate::Reserve => 0,
        Allocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        Allocate::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
    };
    let (offset, len) = (off(offset)?, off(len)?);
    // SAFETY: no memory is passed.
    retry(|| ok(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) }))
}

/// linux/fs.h's `struct fsxattr`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct FsAttributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copy_extent_size: u32,
    padding: [u8; 8],
}

const _: () = assert!(size_of::<FsAttributes>() == 28);

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const GET_ATTRIBUTES: libc::Ioctl = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const SET_ATTRIBUTES: libc::Ioctl = 0x401c_5820;
/// `FS_XFLAG_EXTSIZE`: the extent size counts.
const HAS_EXTENT_SIZE: u32 = 0x800;

/// Has the file system take so many bytes of space at once for an empty file (XFS).
pub(crate) fn set_extent_size(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let mut attributes = FsAttributes::default();
    // SAFETY: the kernel writes the attributes, whose size the number has, and which outlive the call.
    ok(unsafe { libc::ioctl(fd.as_raw_fd(), GET_ATTRIBUTES, &raw mut attributes) })?;
    attributes.flags |= HAS_EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the kernel reads the attributes, whose size the number has, and which outlive the call.
    ok(unsafe { libc::ioctl(fd.as_raw_fd(), SET_ATTRIBUTES, &raw const attributes) })
}

fn flock(kind: libc::c_int, start: u64) -> io::Result<libc::flock> {
    // SAFETY: flock is plain integers, for which zero is a value. l_pid must be 0 for OFD locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    let narrow = |value: libc::c_int| libc::c_short::try_from(value).unwrap_or(0);
    lock.l_type = narrow(kind);
    lock.l_whence = narrow(libc::SEEK_SET);
    lock.l_start = off(start)?;
    lock.l_len = 1;
    Ok(lock)
}

/// Takes (or gives up) a shared OFD lock on one byte.
pub(crate) fn ofd_lock_shared(fd: BorrowedFd<'_>, byte: u64, locked: bool) -> io::Result<()> {
    let kind = if locked { libc::F_RDLCK } else { libc::F_UNLCK };
    let lock = flock(kind, byte)?;
    let lock = std::ptr::from_ref(&lock);
    retry(|| {
        // SAFETY: the kernel reads the lock, which outlives the call.
        ok(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, lock) })
    })
}

/// Whether another open file description holds any OFD lock on the byte.
pub(crate) fn ofd_lock_held(fd: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte)?;
    retry(|| {
        let lock = std::ptr::from_mut(&mut lock);
        // SAFETY: the kernel reads and writes the lock, which outlives the call.
        ok(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, lock) })
    })?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// Whether pointer and length of every buffer suit O_DIRECT with 4096-byte blocks.
pub(super) fn aligned<'a>(parts: impl Iterator<Item = (*const u8, usize)> + 'a) -> bool {
    let mut any = false;
    for (ptr, len) in parts {
        any = true;
        if ptr.addr() % DIRECT_ALIGN != 0 || len % DIRECT_ALIGN != 0 {
            return false;
        }
    }
    any
}

/// Alignment that O_DIRECT needs on any current disk.
pub(super) const DIRECT_ALIGN: usize = 4096;

const _: () = assert!(to_usize(u64::MAX) == usize::MAX);
