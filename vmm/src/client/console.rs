//! `tardigrade console`: this terminal as the terminal of a machine's serial socket.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::Error;
use crate::terminal::RawTerminal;

/// Ctrl-]: leaves the console, as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Connects until the escape key, the end of input, or the end of the machine.
pub(super) fn attach(socket: &Path) -> Result<(), Error> {
    let fail = |source| Error::Console { path: socket.display().to_string(), source };
    let stream = UnixStream::connect(socket).map_err(fail)?;
    eprintln!("Connected to {}; leave with Ctrl-].", socket.display());
    attach_stream(stream).map_err(fail)
}

/// The same with a connection that is there already.
pub(super) fn attach_stream(stream: UnixStream) -> io::Result<()> {
    let keyboard = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let terminal = RawTerminal::enter(&keyboard, false)?;
    let result = relay(stream, keyboard);
    drop(terminal);
    eprintln!();
    result
}

fn relay(mut from_guest: UnixStream, keyboard: File) -> io::Result<()> {
    let to_guest = from_guest.try_clone()?;
    // Ends with the process where the guest ends first: a read of the keyboard cannot be woken.
    std::thread::Builder::new().name("keyboard".to_owned()).spawn(move || {
        let _ = send_keys(keyboard, &to_guest);
        // Wakes the other direction, which ends the console.
        let _ = to_guest.shutdown(Shutdown::Both);
    })?;
    let mut screen = io::stdout().lock();
    let mut buf = [0; 4096];
    loop {
        match from_guest.read(&mut buf)? {
            0 => return Ok(()),
            count => screen.write_all(&buf[..count]).and_then(|()| screen.flush())?,
        }
    }
}

fn send_keys(mut keyboard: File, mut to_guest: &UnixStream) -> io::Result<()> {
    let mut buf = [0; 256];
    loop {
        let count = keyboard.read(&mut buf)?;
        let keys = &buf[..count];
        let end = keys.iter().position(|key| *key == ESCAPE);
        to_guest.write_all(&keys[..end.unwrap_or(count)])?;
        if count == 0 || end.is_some() {
            return Ok(());
        }
    }
}
