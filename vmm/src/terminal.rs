//! The terminal the user sits at: raw while a guest has it, put back afterwards.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A terminal in raw mode; dropping it puts the former mode back.
#[derive(Debug)]
pub struct RawTerminal {
    fd: OwnedFd,
    former: libc::termios,
}

impl RawTerminal {
    /// Makes the terminal behind `file` raw: no echo, no line editing, keys as they come. With
    /// `signals` Ctrl-C still interrupts this program, as `-serial stdio` does in QEMU.
    ///
    /// `None` where `file` is no terminal.
    ///
    /// # Errors
    /// The terminal refuses the mode.
    pub fn enter<F: AsFd>(file: &F, signals: bool) -> io::Result<Option<Self>> {
        if !file.as_fd().is_terminal() {
            return Ok(None);
        }
        let fd = file.as_fd().try_clone_to_owned()?;
        let mut former = MaybeUninit::uninit();
        // SAFETY: the kernel fills the structure that the pointer leads to.
        if unsafe { libc::tcgetattr(fd.as_raw_fd(), former.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded, so the structure is filled.
        let former: libc::termios = unsafe { former.assume_init() };
        let mut raw = former;
        // SAFETY: cfmakeraw only changes the structure it is given.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // The guest writes \r\n itself; what this program prints needs its newlines translated.
        raw.c_oflag |= libc::OPOST;
        if signals {
            raw.c_lflag |= libc::ISIG;
        }
        set(&fd, &raw)?;
        Ok(Some(Self { fd, former }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = set(&self.fd, &self.former) {
            tracing::warn!("cannot put the terminal back: {error}");
        }
    }
}

fn set(fd: &OwnedFd, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: the structure is complete; a descriptor that is no terminal is an error, no harm.
    match unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, mode) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
