//! QEMU's image locks, so that this program and QEMU's never write one image at the same time.
//!
//! A user of an image says by shared OFD locks on single bytes what it does (byte 100 + bit) and
//! what it does not let others do (byte 200 + bit); then it looks whether somebody else's bytes
//! contradict (`block/file-posix.c`, "raw_apply_lock_bytes", "raw_check_lock_bytes"). The bits are
//! QEMU's BLK_PERM_*. Shared locks never block one another, so order does not matter: of two that
//! come at once at least one sees the other.

use std::io;
use std::os::fd::BorrowedFd;

use crate::perm::{BITS, Permissions};
use crate::storage::{ofd_lock_held, ofd_lock_shared};
use crate::{Error, Result};

const PERM_BASE: u64 = 100;
const SHARED_BASE: u64 = 200;

/// Takes the locks; they are given up when the last descriptor of this open file is closed.
///
/// # Errors
/// [`Error::Locked`] if another user contradicts. Where the file system has no locks, only
/// `required` makes that an error.
pub(crate) fn take(
    fd: BorrowedFd<'_>,
    filename: &str,
    wanted: Permissions,
    required: bool,
) -> Result<()> {
    match try_take(fd, filename, wanted) {
        Err(Error::Open { source, .. }) if !required && no_locks(&source) => Ok(()),
        other => other,
    }
}

/// Whether the file system lacks OFD locks.
fn no_locks(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

fn try_take(fd: BorrowedFd<'_>, filename: &str, wanted: Permissions) -> Result<()> {
    let failed = |source| Error::Open { filename: filename.to_owned(), source };
    add(fd, wanted).map_err(failed)?;
    for (perm, bit, name) in BITS {
        let clash = |shared| Error::Locked { filename: filename.to_owned(), lock: name, shared };
        if wanted.used.contains(perm) && ofd_lock_held(fd, SHARED_BASE + bit).map_err(failed)? {
            return Err(clash(false));
        }
        if !wanted.shared.contains(perm) && ofd_lock_held(fd, PERM_BASE + bit).map_err(failed)? {
            return Err(clash(true));
        }
    }
    Ok(())
}

/// Adds the locks without a look at those of others: for a descriptor that takes over from another
/// one of ours, which still holds its own.
pub(crate) fn add(fd: BorrowedFd<'_>, wanted: Permissions) -> io::Result<()> {
    for (perm, bit, _) in BITS {
        if wanted.used.contains(perm) {
            ofd_lock_shared(fd, PERM_BASE + bit, true)?;
        }
        if !wanted.shared.contains(perm) {
            ofd_lock_shared(fd, SHARED_BASE + bit, true)?;
        }
    }
    Ok(())
}

/// Gives up all locks but those of `kept`.
pub(crate) fn reduce(fd: BorrowedFd<'_>, kept: Permissions) -> io::Result<()> {
    for (perm, bit, _) in BITS {
        if !kept.used.contains(perm) {
            ofd_lock_shared(fd, PERM_BASE + bit, false)?;
        }
        if kept.shared.contains(perm) {
            ofd_lock_shared(fd, SHARED_BASE + bit, false)?;
        }
    }
    Ok(())
}
