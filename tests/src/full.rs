//! A host that is out of space.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pattern;

/// A small file system of its own; unmounted when dropped.
pub struct Small(PathBuf);

impl Small {
    /// None where this user may not mount.
    pub fn mount(at: PathBuf, bytes: u64) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let size = format!("size={bytes}");
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&at)
            .output()
            .unwrap();
        if output.status.success() {
            return Some(Self(at));
        }
        eprintln!("SKIPPED: cannot mount a tmpfs: {}", String::from_utf8_lossy(&output.stderr));
        None
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Bytes that are free.
    pub fn free(&self) -> u64 {
        let path = std::ffi::CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: all zeroes is a value of this plain struct.
        let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with NUL, and both live during the call.
        assert_eq!(unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) }, 0);
        stat.f_bavail * stat.f_frsize
    }

    /// Takes all space but `bytes`.
    pub fn leave(&self, bytes: u64) {
        self.give_back();
        let take = self.free() - bytes;
        fs::write(
            self.0.join("ballast"),
            pattern::bytes(1, 0, usize::try_from(take).unwrap() / 8 * 8),
        )
        .unwrap();
    }

    /// Gives what was taken back.
    pub fn give_back(&self) {
        let _ = fs::remove_file(self.0.join("ballast"));
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
