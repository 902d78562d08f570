//! A terminal for a program under test, with this process as the person in front of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::process::poll;

/// A pseudo-terminal.
pub struct Terminal {
    /// The person's side: what is typed goes in, what the program prints comes out.
    screen: File,
    /// The program's side.
    line: File,
}

/// A terminal's settings, to be compared.
#[derive(Debug, PartialEq, Eq)]
pub struct Mode {
    /// c_iflag, c_oflag, c_cflag, c_lflag
    pub flags: [libc::tcflag_t; 4],
    /// c_cc
    pub characters: Vec<libc::cc_t>,
}

impl Terminal {
    /// A new terminal in the mode that a shell leaves it in: echo, line editing, signals.
    pub fn open() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let (name, mode, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
        // SAFETY: both descriptors are written to variables that live; null asks for defaults.
        let made = unsafe { libc::openpty(&raw mut master, &raw mut slave, name, mode, size) };
        assert_eq!(made, 0, "openpty: {}", std::io::Error::last_os_error());
        // SAFETY: openpty made the descriptor, and nobody else has it.
        let screen = File::from(unsafe { OwnedFd::from_raw_fd(master) });
        // SAFETY: the same.
        let line = File::from(unsafe { OwnedFd::from_raw_fd(slave) });
        Self { screen, line }
    }

    /// The mode the terminal is in.
    pub fn mode(&self) -> Mode {
        // SAFETY: a termios is numbers only, for which zero is a value.
        let mut mode: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure, which lives during the call.
        let got = unsafe { libc::tcgetattr(self.line.as_raw_fd(), &raw mut mode) };
        assert_eq!(got, 0, "tcgetattr: {}", std::io::Error::last_os_error());
        let flags = [mode.c_iflag, mode.c_oflag, mode.c_cflag, mode.c_lflag];
        Mode { flags, characters: mode.c_cc.to_vec() }
    }

    /// Waits until the program has put the terminal in such a mode. The kernel tells nobody when a
    /// mode changes, so this looks again and again.
    pub fn wait_for_mode(&self, patience: Duration, wanted: impl Fn(&Mode) -> bool) {
        let deadline = Instant::now() + patience;
        while !wanted(&self.mode()) {
            assert!(Instant::now() < deadline, "the mode stays {:?}", self.mode());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts a program with this as its terminal and that of its signals.
    pub fn spawn(&self, command: &mut Command) -> Child {
        let stdio = || self.line.try_clone().unwrap();
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let become_its_own = || {
            // SAFETY: the call changes only what session the process is in.
            if unsafe { libc::setsid() } < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: the request takes a number; standard input is the terminal by now.
            match unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: between fork and exec the closure makes two system calls and nothing else.
        unsafe { command.pre_exec(become_its_own) };
        command.spawn().unwrap()
    }

    /// Types.
    pub fn type_in(&mut self, keys: &str) {
        self.screen.write_all(keys.as_bytes()).unwrap();
    }

    /// What is printed until `wanted` accepts it. Panics if that takes longer than `patience`.
    pub fn read_until(&mut self, patience: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + patience;
        let mut printed = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&printed).into_owned();
            if wanted(&text) {
                return text;
            }
            let ready = poll(&[self.screen.as_raw_fd()], deadline);
            assert!(ready.is_some(), "the program is silent; it printed: {text:?}");
            let mut buf = [0; 1024];
            let count = self.screen.read(&mut buf).unwrap();
            printed.extend_from_slice(&buf[..count]);
        }
    }
}
