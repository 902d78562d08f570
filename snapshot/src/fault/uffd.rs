//! userfaultfd(2): the system calls, and no more.
//!
//! Own code, because the crate of that name generates its bindings with libclang at build time, and
//! takes no other way where `/dev/userfaultfd` is closed. The structures are those of the kernel's
//! `include/uapi/linux/userfaultfd.h`, which never change.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::units::{PAGE, index};

const API: u64 = 0xaa;
const IOC_NEW: libc::c_ulong = 0xaa00;
const IOC_API: libc::c_ulong = 0xc018_aa3f;
const IOC_REGISTER: libc::c_ulong = 0xc020_aa00;
const IOC_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const IOC_WAKE: libc::c_ulong = 0x8010_aa02;
const IOC_COPY: libc::c_ulong = 0xc028_aa03;
const IOC_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const IOC_MOVE: libc::c_ulong = 0xc028_aa05;
const IOC_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;

const MODE_MISSING: u64 = 1;
const MODE_WRITEPROTECT: u64 = 2;
/// Faults at write-protected pages, and protection of pages that are not there (Linux 6.4).
const FEATURES_WRITES: u64 = 1 | 1 << 13;
/// [`Uffd::give`] works (Linux 6.8).
const FEATURE_MOVE: u64 = 1 << 16;
/// Of a write-protect request: protect. Without it the pages are let go, and who waits is woken.
const PROTECT: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const DEVICE: &str = "/dev/userfaultfd";

/// Messages taken at a time.
const MESSAGES: usize = 16;

#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RangeRequest {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterRequest {
    range: RangeRequest,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyRequest {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct MoveRequest {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

#[repr(C)]
struct ZeroRequest {
    range: RangeRequest,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct ProtectRequest {
    range: RangeRequest,
    mode: u64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    flags: u64,
    address: u64,
    feature: u64,
}

/// Serves missing pages of this process's anonymous memory, for faults of threads and of the
/// kernel alike.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
    can_give: bool,
}

impl Uffd {
    /// Opens one that sees faults of the kernel too, as those of KVM are.
    ///
    /// # Errors
    /// The host does not allow it: it takes CAP_SYS_PTRACE, access to `/dev/userfaultfd`, or the
    /// sysctl `vm.unprivileged_userfaultfd`.
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_with(0)
    }

    /// The same for [`Uffd::register_writes`].
    ///
    /// # Errors
    /// Also where the kernel is older than 6.4.
    pub(crate) fn open_for_writes() -> io::Result<Self> {
        Self::open_with(FEATURES_WRITES)
    }

    fn open_with(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: no memory is passed; a descriptor that is returned is new and ours.
        let fd = match owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                let device = OpenOptions::new().read(true).write(true).open(DEVICE);
                let device = device.map_err(|_| error)?;
                // SAFETY: as above.
                owned(unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) }.into())?
            }
            other => other?,
        };
        let mut uffd = Self { fd, can_give: false };
        let mut api = ApiRequest { api: API, features, ioctls: 0 };
        // SAFETY: the kernel reads and writes a structure of the size that the number names.
        unsafe { uffd.call(IOC_API, &mut api) }?;
        // The kernel tells all that it has, whatever was asked for.
        uffd.can_give = api.features & FEATURE_MOVE != 0;
        Ok(uffd)
    }

    /// Has faults at missing pages of the range wait for [`Uffd::copy`] or [`Uffd::zero`].
    pub(crate) fn register(&self, start: usize, len: u64) -> io::Result<()> {
        let mut request =
            RegisterRequest { range: range(start, len), mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: as for the API; registering changes no contents.
        unsafe { self.call(IOC_REGISTER, &mut request) }
    }

    /// Has writes to protected pages of the range wait for [`Uffd::protect`].
    pub(crate) fn register_writes(&self, start: usize, len: u64) -> io::Result<()> {
        let mut request =
            RegisterRequest { range: range(start, len), mode: MODE_WRITEPROTECT, ioctls: 0 };
        // SAFETY: as for `register`.
        unsafe { self.call(IOC_REGISTER, &mut request) }
    }

    /// Protects pages, or lets writes to them through and wakes who waits.
    pub(crate) fn protect(&self, start: usize, len: u64, on: bool) -> io::Result<()> {
        let mode = if on { PROTECT } else { 0 };
        let mut request = ProtectRequest { range: range(start, len), mode };
        loop {
            // SAFETY: as for the API; protection changes no contents.
            match unsafe { self.call(IOC_WRITEPROTECT, &mut request) } {
                // The address space changed meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Ends either, and wakes who waits: a page that is still missing is zero from now on.
    pub(crate) fn unregister(&self, start: usize, len: u64) -> io::Result<()> {
        // SAFETY: as for the API. What the pages are to whoever registered them is the caller's.
        unsafe { self.call(IOC_UNREGISTER, &mut range(start, len)) }
    }

    /// Has who waits in the range look again.
    pub(crate) fn wake(&self, start: usize, len: u64) -> io::Result<()> {
        // SAFETY: as for the API.
        unsafe { self.call(IOC_WAKE, &mut range(start, len)) }
    }

    /// Puts the bytes at `from` in the missing pages from `to`, and wakes who waits. Pages that are
    /// there already stay as they are.
    ///
    /// # Safety
    /// `len` bytes from `from` are readable.
    pub(crate) unsafe fn copy(&self, to: usize, from: *const u8, len: u64) -> io::Result<()> {
        self.in_steps(to, len, |done| {
            let mut request = CopyRequest {
                dst: (to as u64) + done,
                src: (from.addr() as u64) + done,
                len: len - done,
                mode: 0,
                copied: 0,
            };
            // SAFETY: as for the API; the kernel writes missing pages of registered ranges only,
            // and reads what the caller vouched for.
            let result = unsafe { self.call(IOC_COPY, &mut request) };
            (result, request.copied)
        })
    }

    /// Whether [`Uffd::give`] gives pages instead of copying them.
    pub(crate) fn can_give(&self) -> bool {
        self.can_give
    }

    /// Puts the pages from `from` themselves in the missing pages from `to`, and wakes who waits; huge
    /// pages stay such. What cannot be given is copied, and the rest of `from` is empty.
    ///
    /// # Safety
    /// The range from `from` is of private anonymous memory, which nobody else uses.
    pub(crate) unsafe fn give(&self, to: usize, from: *mut u8, len: u64) -> io::Result<()> {
        let mut done = 0;
        while self.can_give && done < len {
            let mut request = MoveRequest {
                dst: (to as u64) + done,
                src: (from.addr() as u64) + done,
                len: len - done,
                mode: 0,
                moved: 0,
            };
            // SAFETY: as for `copy`; what is taken away from `from` is the caller's to give.
            let result = unsafe { self.call(IOC_MOVE, &mut request) };
            done += u64::try_from(request.moved).unwrap_or(0);
            match result {
                // A part was done, or the address space changed meanwhile.
                Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => break,
                _ => {}
            }
        }
        // SAFETY: the rest is as it was, and readable.
        unsafe { self.copy(to + index(done), from.wrapping_add(index(done)), len - done) }
    }

    /// Makes the missing pages of the range zero, and wakes who waits.
    pub(crate) fn zero(&self, to: usize, len: u64) -> io::Result<()> {
        self.in_steps(to, len, |done| {
            let range = range(to + index(done), len - done);
            let mut request = ZeroRequest { range, mode: 0, zeroed: 0 };
            // SAFETY: as for `copy`.
            let result = unsafe { self.call(IOC_ZEROPAGE, &mut request) };
            (result, request.zeroed)
        })
    }

    /// Calls until all of `len` is done: the kernel may do a part, and ends at a page that is there.
    fn in_steps(
        &self,
        to: usize,
        len: u64,
        mut step: impl FnMut(u64) -> (io::Result<()>, i64),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (result, bytes) = step(done);
            // Negative is the error of a call that did nothing.
            done += u64::try_from(bytes).unwrap_or(0);
            match result {
                Ok(()) => {}
                Err(error) => match error.raw_os_error() {
                    // A part was done, or the address space changed meanwhile.
                    Some(libc::EAGAIN) => {}
                    Some(libc::EEXIST) => {
                        // Someone may have begun to wait just before the page came.
                        self.wake(to + index(done), PAGE)?;
                        done += PAGE;
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// The addresses of faults that came, as many as there are now, in `into`.
    pub(crate) fn faults(&self, into: &mut Vec<usize>) -> io::Result<()> {
        let mut messages = [Message::default(); MESSAGES];
        // SAFETY: the buffer is that large, and any bytes are a message.
        let read = unsafe {
            libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages))
        };
        let Ok(bytes) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        };
        let messages = messages.iter().take(bytes / size_of::<Message>());
        into.extend(messages.filter(|m| m.event == EVENT_PAGEFAULT).map(|m| index(m.address)));
        Ok(())
    }

    /// # Safety
    /// `T` must be what the number names, and the call sound with it.
    unsafe fn call<T>(&self, number: libc::c_ulong, request: &mut T) -> io::Result<()> {
        // SAFETY: the caller vouches for the structure, which outlives the call.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), number, std::ptr::from_mut(request)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn range(start: usize, len: u64) -> RangeRequest {
    RangeRequest { start: start as u64, len }
}

/// A descriptor that a system call returned.
fn owned(ret: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(ret) {
        // SAFETY: the kernel has just made it, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
