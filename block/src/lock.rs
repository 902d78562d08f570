//! QEMU's image locks, so that this program and QEMU's never write one image at the same time.
//!
//! A user of an image says by shared OFD locks on single bytes what it does (byte 100 + bit) and
//! what it does not let others do (byte 200 + bit); then it looks whether somebody else's bytes
//! contradict (`block/file-posix.c`, "raw_apply_lock_bytes", "raw_check_lock_bytes"). The bits are
//! QEMU's BLK_PERM_*. Shared locks never block one another, so order does not matter: of two that
//! come at once at least one sees the other.

use std::io;
use std::os::fd::BorrowedFd;

use crate::storage::{ofd_lock_held, ofd_lock_shared};
use crate::{Error, Result};

const PERM_BASE: u64 = 100;
const SHARED_BASE: u64 = 200;

bitflags::bitflags! {
    /// QEMU's BLK_PERM_* bits that are visible in a file.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Perm: u32 {
        /// The image's contents make sense while it is open.
        const CONSISTENT_READ = 1;
        const WRITE = 2;
        /// Writes that change nothing a reader sees.
        const WRITE_UNCHANGED = 4;
        const RESIZE = 8;
    }
}

/// What an opener does and what it lets others do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permissions {
    used: Perm,
    shared: Perm,
}

impl Permissions {
    /// What QEMU takes for an image in a format with metadata: others may read, never write.
    pub(crate) fn of_image(writable: bool, force_share: bool) -> Self {
        let mut used = Perm::CONSISTENT_READ;
        let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        if writable {
            used |= Perm::WRITE | Perm::RESIZE;
        } else if force_share {
            used = Perm::empty();
            shared = Perm::all();
        }
        Self { used, shared }
    }
}

const BITS: [(Perm, u64, &str); 4] = [
    (Perm::CONSISTENT_READ, 0, "consistent read"),
    (Perm::WRITE, 1, "write"),
    (Perm::WRITE_UNCHANGED, 2, "write unchanged"),
    (Perm::RESIZE, 3, "resize"),
];

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
    for (perm, bit, _) in BITS {
        if wanted.used.contains(perm) {
            ofd_lock_shared(fd, PERM_BASE + bit, true).map_err(failed)?;
        }
        if !wanted.shared.contains(perm) {
            ofd_lock_shared(fd, SHARED_BASE + bit, true).map_err(failed)?;
        }
    }
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
